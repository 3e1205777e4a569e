"""Weights and models that several cases start from."""

from __future__ import annotations

from typing import Any

import torch

import peft_kernels as pk

from .case import Options
from .peers import bnb


def nf4_weight(options: Options, n: int, k: int) -> tuple[Any, pk.Weight4bit]:
    """The same nested NF4 weight as a bitsandbytes layer (None without bitsandbytes) and as a Weight4bit."""
    w = options.randn(n, k) * 0.02
    if bnb.why_not():
        return None, pk.Weight4bit.quantize(w)
    layer = bnb.linear(w)
    return layer, pk.Weight4bit.from_bnb(layer.weight)


def fresh(weight: pk.Weight4bit) -> pk.Weight4bit:
    """The same weight in memory of its own."""
    return pk.Weight4bit.from_parts([part.clone() for part in weight.parts()], weight.meta())


def replaced(model: torch.nn.Module) -> torch.nn.Module:
    """The model after replace_layers."""
    pk.replace_layers(model)
    return model


def unchanged(model: torch.nn.Module) -> torch.nn.Module:
    """The model as the peer left it."""
    return model
