"""The learned vector of a layer, or the product of those of its active adapters."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch

from ...checks import bad_type, bad_value, check_tensor


def combined_scale(
    scale: torch.Tensor | Sequence[torch.Tensor], shape: Sequence[int], is_feedforward: bool
) -> torch.Tensor:
    """One vector as it is, or the product of several, (N,) or for a feed-forward layer (K,), with gradients to each."""
    features = shape[1] if is_feedforward else shape[0]
    allowed = ((features,), (1, features)) if is_feedforward else ((features,), (features, 1))
    single = isinstance(scale, torch.Tensor)
    if not (single or isinstance(scale, Sequence)):
        raise bad_type("scale", "a torch.Tensor or a sequence of them", scale, "Pass the learned vector.")
    vectors: list[torch.Tensor] = [scale] if isinstance(scale, torch.Tensor) else list(scale)
    if not vectors:
        raise bad_value("scale", "at least one vector", "none", "Call the base layer when no adapter is active.")
    for i, vector in enumerate(vectors):
        name = "scale" if single else f"scale[{i}]"
        check_tensor(name, vector)
        if tuple(vector.shape) not in allowed:
            kind = "scales the input" if is_feedforward else "scales the output"
            remedy = f"It {kind} of a weight {tuple(shape)}; see is_feedforward."
            raise bad_value(name, f"shape {allowed[0]} or {allowed[1]}", tuple(vector.shape), remedy)
        if vector.device != vectors[0].device:
            expected = f"device {vectors[0].device} (that of scale[0])"
            raise bad_value(name, expected, vector.device, f"Move it with .to('{vectors[0].device}').")
    if len(vectors) == 1:
        return vectors[0]
    return functools.reduce(operator.mul, (vector.reshape(-1) for vector in vectors))
