"""`lora_linear` in pure torch: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...dropout import draw_seeds, scale_mask
from ...weight4bit import Weight4bit
from ..nf4.op import dequantize_reference
from .adapters import Adapters


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """Y = x W^T + b + sum_i s_i (drop_i(x) A_i^T) B_i^T; see `peft_kernels.functional.lora_linear`."""
    adapters = Adapters.parse(lora_A, lora_B, scaling, lora_bias, dropout_p, training)
    return with_seeds(x, weight, adapters, bias, draw_seeds(adapters.dropout_p, x.device))


def with_seeds(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    adapters: Adapters,
    bias: torch.Tensor | None,
    seeds: torch.Tensor | None,
) -> torch.Tensor:
    """The same with the dropout seeds given; each adapter computes in its own dtype and the result is cast once."""
    w = dequantize_reference(weight, x.dtype) if isinstance(weight, Weight4bit) else weight
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    for i, (a, b, s, lora_bias, p) in enumerate(adapters):
        dropped = x
        if seeds is not None and p > 0:
            rows = x.reshape(-1, x.shape[-1])
            dropped = x * scale_mask(seeds[i], rows.shape[0], rows.shape[1], p).view_as(x).to(x.dtype)
        y = y + F.linear(F.linear(dropped.to(a.dtype), a), b.to(a.dtype), lora_bias) * s
    return y.to(x.dtype)
