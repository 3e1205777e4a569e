"""Every operation as a function, on the fastest backend that can run it."""

from .ops.linear_4bit.op import linear_4bit
from .ops.lora_linear.op import lora_linear
from .weight4bit import dequantize_4bit, quantize_4bit

__all__ = ["dequantize_4bit", "linear_4bit", "lora_linear", "quantize_4bit"]
