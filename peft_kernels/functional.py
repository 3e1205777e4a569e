"""Every operation as a function, on the fastest backend that can run it."""

from .ops.gated_prompt_attention.op import gated_prompt_attention
from .ops.linear_4bit.op import linear_4bit
from .ops.lora_linear.op import lora_linear
from .ops.prefix_attention.op import prefix_attention
from .weight4bit import dequantize_4bit, quantize_4bit

__all__ = [
    "dequantize_4bit",
    "gated_prompt_attention",
    "linear_4bit",
    "lora_linear",
    "prefix_attention",
    "quantize_4bit",
]
