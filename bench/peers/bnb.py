"""bitsandbytes: Linear4bit with nested NF4, and its codec."""

from __future__ import annotations

from typing import Any

import torch

from . import missing

NAME = "bitsandbytes"


def why_not() -> str | None:
    """Why it cannot run here."""
    return missing("bitsandbytes")


def linear(weight: torch.Tensor, bias: torch.nn.Parameter | None = None) -> Any:
    """A Linear4bit in train mode that holds `weight` (N, K), quantized with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.bias = bias
    return layer.to(weight.device)  # the move quantizes


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(packed, quant_state)."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """W (N, K)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)
