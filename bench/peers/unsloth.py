"""unsloth's LoRA layer for one projection, over bitsandbytes' weight. CUDA only."""

from __future__ import annotations

from typing import Any

import torch

from . import missing

NAME = "unsloth"


def why_not(device: torch.device) -> str | None:
    """Why it cannot run here."""
    return missing("unsloth", "bitsandbytes") or (None if device.type == "cuda" else f"it has no {device.type} kernels")


def lora_linear(x: torch.Tensor, weight: Any, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
    """x (M, K), weight a Params4bit (N, K), lora_A (r, K), lora_B (N, r) -> (M, N)."""
    from unsloth.kernels.fast_lora import LoRA_W

    # it takes (batch, sequence, features)
    return LoRA_W.apply(x.unsqueeze(0), weight, weight.quant_state, lora_A, lora_B, scaling).squeeze(0)
