"""LoRAFusion's fused linear layer with LoRA. CUDA only, and over a dense base weight."""

from __future__ import annotations

import torch

from . import missing

NAME = "lorafusion, dense base"


def why_not(device: torch.device) -> str | None:
    """Why it cannot run here."""
    return missing("lorafusion") or (None if device.type == "cuda" else f"it has no {device.type} kernels")


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """x (M, K), weight (N, K) in x's dtype, lora_A (r, K), lora_B (N, r) -> (M, N)."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return fused_linear_lora(x.unsqueeze(0), weight, a, b, scaling).squeeze(0)  # it takes (batch, sequence, features)
