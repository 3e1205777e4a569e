"""The `adapters` library: its bottleneck adapter. `PYTHONPATH=build/adapters` shows it to Python: see the Makefile."""

from __future__ import annotations

from typing import Any

import torch

from . import missing

NAME = "adapters"


def why_not() -> str | None:
    """Why it cannot run here."""
    return missing("adapters")


def adapter(
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    *,
    ln_weight: torch.Tensor | None = None,
    ln_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.nn.Module:
    """An adapter in train mode with copies of these weights: `module(x, residual)[0]` is its output.

    options: fields of the library's SeqBnConfig besides the LayerNorm's (non_linearity="gelu", is_parallel=True, ...).
    """
    from adapters import SeqBnConfig
    from adapters.methods import modeling

    config = SeqBnConfig(ln_before=ln_weight is not None, **options)
    kind = modeling.ParallelAdapter if config.is_parallel else modeling.Adapter
    layer = kind("peer", *reversed(down_weight.shape), config)
    *norm, down, _ = layer.adapter_down
    values = {down: (down_weight, down_bias), layer.adapter_up: (up_weight, up_bias)}
    values |= {module: (ln_weight, ln_bias) for module in norm}
    for module, tensors in values.items():
        module.weight, module.bias = (torch.nn.Parameter(t.detach().clone()) for t in tensors)
    return layer.train()
