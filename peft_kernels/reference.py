"""Every operation in pure torch, with the same names and signatures as in `functional`: the oracle of the tests."""

from __future__ import annotations

import torch

from .dispatch import use_backend
from .ops.bottleneck_adapter.reference import bottleneck_adapter
from .ops.gated_prompt_attention.reference import gated_prompt_attention
from .ops.linear_4bit.reference import linear_4bit
from .ops.lora_linear.reference import lora_linear
from .ops.nf4.op import dequantize_reference
from .ops.prefix_attention.reference import prefix_attention
from .ops.prompt_embedding.reference import prompt_embedding
from .ops.scaled_linear.reference import bitfit_linear, ia3_linear, scale_bias_linear
from .weight4bit import Weight4bit, check_weight4bit

__all__ = [
    "bitfit_linear",
    "bottleneck_adapter",
    "dequantize_4bit",
    "gated_prompt_attention",
    "ia3_linear",
    "linear_4bit",
    "lora_linear",
    "prefix_attention",
    "prompt_embedding",
    "quantize_4bit",
    "scale_bias_linear",
]


def quantize_4bit(
    w: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> Weight4bit:
    """See `peft_kernels.functional.quantize_4bit`."""
    with use_backend("reference"):
        return Weight4bit.quantize(w, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype | None = None) -> torch.Tensor:
    """See `peft_kernels.functional.dequantize_4bit`."""
    return dequantize_reference(check_weight4bit(weight), dtype or weight.dtype)
