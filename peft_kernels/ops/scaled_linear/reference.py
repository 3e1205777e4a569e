"""`ia3_linear`, `bitfit_linear` and `scale_bias_linear` in pure torch: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...weight4bit import Weight4bit
from ..nf4.op import dequantize_reference
from .scales import combined_scale


def ia3_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    scale: torch.Tensor | Sequence[torch.Tensor],
    *,
    bias: torch.Tensor | None = None,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """Y = l * (x W^T + b), feed-forward: (l * x) W^T + b; see `peft_kernels.functional.ia3_linear`."""
    return scaled_linear(x, weight, bias, combined_scale(scale, weight.shape, is_feedforward), is_feedforward)


def bitfit_linear(x: torch.Tensor, weight: torch.Tensor | Weight4bit, bias: torch.Tensor) -> torch.Tensor:
    """Y = x W^T + b; see `peft_kernels.functional.bitfit_linear`."""
    return scaled_linear(x, weight, bias, None, False)


def scale_bias_linear(
    x: torch.Tensor, weight: torch.Tensor | Weight4bit, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Y = a * (x W^T + b); see `peft_kernels.functional.scale_bias_linear`."""
    return scaled_linear(x, weight, bias, combined_scale(scale, weight.shape, False), False)


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
) -> torch.Tensor:
    """What the three have in common: one product, its input or its output scaled, in x's dtype between the steps."""
    scale = None if scale is None else scale.reshape(-1)
    w = dequantize_reference(weight, x.dtype) if isinstance(weight, Weight4bit) else weight
    if scale is not None and is_feedforward:
        x = (x * scale).to(x.dtype)
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return y if scale is None or is_feedforward else (y * scale).to(x.dtype)
