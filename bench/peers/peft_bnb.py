"""Hugging Face PEFT: its LoRA and IA³ layers over bitsandbytes' Linear4bit, as for a model loaded in 4 bits."""

from __future__ import annotations

from typing import Any

import torch

from . import missing

NAME = "peft + bitsandbytes"


def why_not() -> str | None:
    """Why it cannot run here."""
    return missing("peft", "bitsandbytes")


def lora_layer(base: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, alpha: float) -> torch.nn.Sequential:
    """A model of one layer "proj" in train mode with these adapter weights, in their dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential()
    model.proj = base
    model.is_loaded_in_4bit = True  # what transformers sets; PEFT then takes its bitsandbytes class
    inject_adapter_in_model(LoraConfig(r=lora_A.shape[0], lora_alpha=alpha, target_modules=["proj"]), model)
    for adapter, value in ((model.proj.lora_A, lora_A), (model.proj.lora_B, lora_B)):
        adapter["default"].weight = torch.nn.Parameter(value.detach().clone())
    return model.train()


def ia3_layer(base: Any, scale: torch.Tensor, feedforward: bool) -> torch.nn.Sequential:
    """A model of one layer "proj" in train mode with this IA³ vector, (N, 1) or for a feed-forward layer (1, K)."""
    from peft import IA3Config, inject_adapter_in_model

    model = torch.nn.Sequential()
    model.proj = base
    model.is_loaded_in_4bit = True  # as above
    config = IA3Config(target_modules=["proj"], feedforward_modules=["proj"] if feedforward else [])
    inject_adapter_in_model(config, model)
    model.proj.ia3_l["default"] = torch.nn.Parameter(scale.detach().clone())
    return model.train()
