"""The calls that are compiled ahead of time for `linear_4bit`: each tile of its tables once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from ..nf4.triton_aot import meta_weight
from .triton_kernels import fused_backward, fused_forward

_N, _K = 14336, 4096


def _forward(rows: int, dtype: torch.dtype = torch.bfloat16, **weight: object) -> None:
    x, bias = torch.empty(rows, _K, dtype=dtype), torch.empty(_N, dtype=dtype)
    fused_forward(x, meta_weight(_N, _K, **weight), bias, None)  # type: ignore[arg-type]


def _backward(rows: int, **weight: object) -> None:
    dy = torch.empty(rows, _N, dtype=torch.bfloat16)
    fused_backward(dy, meta_weight(_N, _K, **weight), None)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """Every tile with nested statistics; plain ones, FP4, float16 and the other ways to decode once."""
    for rows in (1, 16, 32, 64, 256):
        yield Case(f"forward M={rows} bf16 nested", rows, partial(_forward, rows))
        yield Case(f"backward M={rows} bf16 nested", rows, partial(_backward, rows))
        yield Case(f"forward M={rows} bf16 nested tiled", rows, partial(_forward, rows, layout="tiled"))
        yield Case(f"backward M={rows} bf16 nested tiled", rows, partial(_backward, rows, layout="tiled"))
    yield Case("forward M=1 bf16 plain", 1, lambda: _forward(1, nested=False))
    yield Case("forward M=1 fp16 fp4 nested", 1, lambda: _forward(1, torch.float16, quant_type="fp4"))
    yield Case("forward M=64 fp16 nested", 64, lambda: _forward(64, torch.float16))
    yield Case("forward M=64 bf16 blocksize 32", 64, lambda: _forward(64, blocksize=32))
    yield Case("backward M=64 bf16 blocksize 32", 64, lambda: _backward(64, blocksize=32))
    yield Case("forward M=1 bf16 any", 1, lambda: _forward(1, nested=False, blocksize=8192))
    yield Case("backward M=1 bf16 any", 1, lambda: _backward(1, nested=False, blocksize=8192))
