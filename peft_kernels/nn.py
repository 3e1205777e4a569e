"""Every operation as an nn.Module."""

from .ops.bottleneck_adapter.module import BottleneckAdapter
from .ops.gated_prompt_attention.module import GatedPromptAttention
from .ops.linear_4bit.module import Linear4bit
from .ops.lora_linear.module import LoRALinear
from .ops.prefix_attention.module import PrefixAttention
from .ops.prompt_embedding.module import PrefixEncoder, PromptEmbedding, PromptEncoder
from .ops.scaled_linear.module import BitFitLinear, IA3Linear, ScaleBiasLinear

__all__ = [
    "BitFitLinear",
    "BottleneckAdapter",
    "GatedPromptAttention",
    "IA3Linear",
    "Linear4bit",
    "LoRALinear",
    "PrefixAttention",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoder",
    "ScaleBiasLinear",
]
