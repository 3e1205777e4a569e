"""`linear_4bit` in pure torch: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...weight4bit import Weight4bit
from ..nf4.op import dequantize_reference


def linear_4bit(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Y = x W^T + b with W decoded to x's dtype; see `peft_kernels.functional.linear_4bit`."""
    return F.linear(x, dequantize_reference(weight, x.dtype), None if bias is None else bias.to(x.dtype))
