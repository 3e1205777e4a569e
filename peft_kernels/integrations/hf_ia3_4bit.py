"""Hugging Face PEFT's IA³ layer for 4-bit models; apart, because PEFT's module for it imports bitsandbytes."""

from __future__ import annotations

import peft.tuners.ia3.bnb as ia3_bnb
import torch

from .hf_ia3 import FusedIA3


class FusedLinear4bit(FusedIA3, ia3_bnb.Linear4bit):
    """`peft.tuners.ia3.Linear4bit`, the IA³ layer of a model that was loaded in 4 bits."""

    def _four_bit_dtypes(self, x: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """PEFT widens x to float32 (unless CUDA's autocast is on) and returns the product with the vector uncast."""
        given = x.dtype if torch.is_autocast_enabled() else torch.float32
        returned = torch.promote_types(given, scale_dtype)
        return returned if self.is_feedforward else given, returned
