"""What a fused layer reads of the linear layer below it, and why it may not bypass that layer's own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..checks import autocasts
from ..weight4bit import Weight4bit
from .replace import FOUR_BIT, own_forward

PLAIN = (torch.Tensor, nn.Parameter)  # not DTensor, not a quantized or otherwise wrapped tensor


def overridden(module: nn.Module) -> str | None:
    """Why the module's forward may not be bypassed: something else has to see or do the call."""
    if "forward" in module.__dict__ and not own_forward(module):
        return "forward is replaced on the instance" + (" (accelerate's hook)" if hasattr(module, "_hf_hook") else "")
    return None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or overridden(module)
    )


def dense_base(base: Any, x: torch.Tensor) -> Any:
    """x, weight and None; torch's rules for mixed dtypes are torch's to enforce."""
    weight, bias = base._parameters.get("weight"), base._parameters["bias"]
    if type(weight) not in PLAIN:
        return f"the base weight is a {type(weight).__name__}, which is gathered by its module's forward"
    if autocasts(x.device):
        if x.dtype is torch.float64:
            return "autocast leaves float64 as it is"
    elif weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        return f"x is {x.dtype}, the base layer {weight.dtype}"
    return x, weight, None


def four_bit_weight(base: Any) -> Weight4bit | str:
    """The Weight4bit of a 4-bit base layer, or why it cannot be read."""
    if type(base) not in FOUR_BIT:
        return f"the base layer is a {type(base).__name__} that replace_layers has not seen"
    weight = base._weight4bit()
    return f"the base layer's {weight}" if isinstance(weight, str) else weight
