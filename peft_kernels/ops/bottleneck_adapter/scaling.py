"""The scaling of a bottleneck adapter, which comes in four forms, as factors of its rows and its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...checks import bad_type, bad_value, check_device, check_tensor

Factor = float | torch.Tensor
_REMEDY = "Pass a float, a tensor of 1 or N elements, or one that broadcasts to (..., 1)."


def factors(scaling: Factor | Sequence[Factor]) -> list[Any]:
    """The argument as a list of factors; a TypeError where one is neither a number nor a tensor."""
    given = list(scaling) if isinstance(scaling, (tuple, list)) else [scaling]
    for factor in given:
        if isinstance(factor, bool) or not isinstance(factor, (int, float, torch.Tensor)):
            raise bad_type("scaling", "a float, a tensor, or a sequence of them", factor, _REMEDY)
    return given


class Scaling(NamedTuple):
    """The product of a constant, a factor per column (N,) and one per row (M,)."""

    constant: float
    channel: torch.Tensor | None
    gate: torch.Tensor | None


def parse_scaling(scaling: Factor | Sequence[Factor], x: torch.Tensor, out_features: int) -> Scaling:
    """From the public argument; a learned scalar becomes a column factor, so that autograd sums its gradient.

    Raises:
        TypeError: a factor is neither a number nor a tensor. ValueError: a shape, dtype or device does not fit.
    """
    if isinstance(scaling, float):
        return Scaling(scaling, None, None)
    constant, channel, gate = 1.0, None, None
    for factor in factors(scaling):
        if isinstance(factor, (int, float)):
            constant *= factor
            continue
        check_tensor("scaling", factor)
        check_device("scaling", factor, x.device)
        if factor.numel() == 1 or factor.shape == (out_features,):
            factor = factor.reshape(-1).expand(out_features)
            channel = factor if channel is None else channel * factor
        else:
            rows = _per_row(factor, x)
            gate = rows if gate is None else gate * rows
    return Scaling(constant, channel, gate)


def _per_row(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A factor that broadcasts to (..., 1) as (M,)."""
    shape = (*x.shape[:-1], 1)
    try:
        if factor.shape[-1] == 1:
            return factor.expand(shape).reshape(-1)
    except RuntimeError:  # it does not broadcast
        pass
    raise bad_value("scaling", f"1 or N elements, or a shape that broadcasts to {shape}", tuple(factor.shape), _REMEDY)
