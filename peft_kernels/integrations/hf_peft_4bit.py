"""Hugging Face PEFT's LoRA layer for 4-bit models; apart, because PEFT's module for it imports bitsandbytes."""

from __future__ import annotations

import peft.tuners.lora.bnb as lora_bnb

from .hf_peft import FusedLoRA


class FusedLinear4bit(FusedLoRA, lora_bnb.Linear4bit):
    """`peft.tuners.lora.Linear4bit`, the LoRA layer of a model that was loaded in 4 bits."""
