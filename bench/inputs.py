"""Weights and models that several cases start from."""

from __future__ import annotations

from typing import Any

import torch

import peft_kernels as pk

from .case import Options
from .peers import bnb, torch_adapter


def nf4_bytes(n: int, k: int) -> int:
    """Bytes of a nested NF4 weight: a nibble an element, a byte a block of 64, a float32 for 256 of those."""
    return n * k // 2 + n * k // 64 + n * k // (64 * 64)


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


def bottleneck(adapter: torch_adapter.Adapter) -> pk.nn.BottleneckAdapter:
    """Our module with copies of this adapter's weights."""
    r, k = adapter.down.weight.shape
    norm = isinstance(adapter.norm, torch.nn.LayerNorm)
    layer = pk.nn.BottleneckAdapter(k, r, scaling=adapter.scaling, norm_before=norm).to(adapter.down.weight)
    layer.load_state_dict({key.replace("norm.", "norm_before."): value for key, value in adapter.state_dict().items()})
    return layer


def compiled(module: torch.nn.Module) -> Any:
    """The module under torch.compile, such that its backward pass can be timed alone, several times over one graph."""
    import torch._functorch.config as config

    config.donated_buffer = False
    return torch.compile(module)


def replaced(model: torch.nn.Module) -> torch.nn.Module:
    """The model after replace_layers."""
    pk.replace_layers(model)
    return model


def unchanged(model: torch.nn.Module) -> torch.nn.Module:
    """The model as the peer left it."""
    return model
