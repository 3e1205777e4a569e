"""Every operation as an nn.Module."""

from .ops.linear_4bit.module import Linear4bit
from .ops.lora_linear.module import LoRALinear

__all__ = ["Linear4bit", "LoRALinear"]
