"""peft_kernels: fused kernels for parameter-efficient fine-tuning, as drop-in layers."""

from . import functional, nn, reference
from .checks import BackendError
from .dispatch import backends, explain, use_backend
from .integrations.prepare import PreparationReport, prepare_bitfit, prepare_scale_bias
from .integrations.replace import ReplacementReport, replace_layers, restore_layers
from .weight4bit import Weight4bit

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PreparationReport",
    "ReplacementReport",
    "Weight4bit",
    "backends",
    "explain",
    "functional",
    "nn",
    "prepare_bitfit",
    "prepare_scale_bias",
    "reference",
    "replace_layers",
    "restore_layers",
    "use_backend",
]
