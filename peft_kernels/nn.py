"""Every operation as an nn.Module."""

from .ops.linear_4bit.module import Linear4bit
from .ops.lora_linear.module import LoRALinear
from .ops.scaled_linear.module import BitFitLinear, IA3Linear, ScaleBiasLinear

__all__ = ["BitFitLinear", "IA3Linear", "Linear4bit", "LoRALinear", "ScaleBiasLinear"]
