"""The calls that are compiled ahead of time for scaled, biased linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from ..linear_4bit.triton_kernels import fused_forward
from ..nf4.triton_aot import meta_weight
from .triton_columns import columns

_N, _K = 14336, 4096


def _column_passes(rows: int, dtype: torch.dtype) -> None:
    """What the layers ask for: scale alone, sums alone, both with products, and scale in place with products."""
    u, v, scale = torch.empty(rows, _K, dtype=dtype), torch.empty(rows, _K, dtype=dtype), torch.empty(_K)
    columns(u, scale=scale, out=v)
    columns(u, sums=True)
    columns(u, times=v, scale=scale, out=torch.empty_like(u), sums=True)
    columns(u, times=v, scale=scale, out=u)


def _forward(rows: int) -> None:
    x, bias = torch.empty(rows, _K, dtype=torch.bfloat16), torch.empty(_N, dtype=torch.bfloat16)
    fused_forward(x, meta_weight(_N, _K), bias, None, torch.empty(_N))


def cases() -> Iterator[Case]:
    """The passes in training, and the fused forward with a scale."""
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(f"columns M=8192 {str(dtype).removeprefix('torch.')}", 0, partial(_column_passes, 8192, dtype))
    yield Case("columns M=1 bfloat16", 0, lambda: _column_passes(1, torch.bfloat16))
    for rows in (1, 64, 256):
        yield Case(f"forward scaled M={rows} bf16 nested", rows, partial(_forward, rows))
