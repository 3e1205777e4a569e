"""Liger-Kernel in a Llama model: norms, rotary embedding, SwiGLU and loss. It has no LoRA; a model's step overlaps."""

from __future__ import annotations

import torch

from . import missing

NAME = "peft + bitsandbytes + liger"


def why_not(device: torch.device) -> str | None:
    """Why it cannot run here."""
    return missing("liger_kernel", "peft", "bitsandbytes") or (
        None if device.type != "cpu" else f"it has no {device.type} kernels"
    )


def patched(model: torch.nn.Module) -> torch.nn.Module:
    """This Llama model with Liger's kernels; other instances stay as they are."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # the fused loss keeps no logits, and the check reads them
    apply_liger_kernel_to_llama(model=model, rope=False, fused_linear_cross_entropy=False)
    return model
