"""Every operation as a function, on the fastest backend that can run it."""

from .ops.bottleneck_adapter.op import bottleneck_adapter
from .ops.gated_prompt_attention.op import gated_prompt_attention
from .ops.linear_4bit.op import linear_4bit
from .ops.lora_linear.op import lora_linear
from .ops.prefix_attention.op import prefix_attention
from .ops.prompt_embedding.op import prompt_embedding
from .ops.scaled_linear.op import bitfit_linear, ia3_linear, scale_bias_linear
from .weight4bit import dequantize_4bit, quantize_4bit

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
