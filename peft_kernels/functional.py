"""Every operation as a function, on the fastest backend that can run it."""

from .ops.linear_4bit.op import linear_4bit
from .ops.lora_linear.op import lora_linear
from .ops.scaled_linear.op import bitfit_linear, ia3_linear, scale_bias_linear
from .weight4bit import dequantize_4bit, quantize_4bit

__all__ = [
    "bitfit_linear",
    "dequantize_4bit",
    "ia3_linear",
    "linear_4bit",
    "lora_linear",
    "quantize_4bit",
    "scale_bias_linear",
]
