"""`bottleneck_adapter` in pure torch: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...dropout import draw_seeds, scale_mask
from .activations import ACTIVATIONS, canonical
from .scaling import Factor, factors


def bottleneck_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: str = "relu",
    scaling: Factor | Sequence[Factor] = 1.0,
    residual: torch.Tensor | None = None,
    ln_weight: torch.Tensor | None = None,
    ln_bias: torch.Tensor | None = None,
    ln_eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """Y = residual + drop(s (act(LN(x) Wd^T + bd) Wu^T + bu)); see `peft_kernels.functional.bottleneck_adapter`."""
    seed = draw_seeds([dropout_p if training else 0.0], x.device)
    h = x
    if ln_weight is not None:
        ln_bias = None if ln_bias is None else ln_bias.to(ln_weight.dtype)
        h = F.layer_norm(x.to(ln_weight.dtype), ln_weight.shape, ln_weight, ln_bias, ln_eps)
    h = ACTIVATIONS[canonical(activation)](_linear(h, down_weight, down_bias))
    y = _linear(h, up_weight, up_bias)
    for factor in factors(scaling):
        y = y * factor
    if seed is not None:
        y = y * scale_mask(seed[0], y.shape[:-1].numel(), y.shape[-1], dropout_p).view_as(y).to(y.dtype)
    if residual is None:
        return y.to(x.dtype)
    return (y + residual).to(torch.promote_types(x.dtype, residual.dtype))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer in its weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
