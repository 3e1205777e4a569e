"""The calls that are compiled ahead of time for `lora_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from ...triton_common.lowrank import LowRank, expand, expand_add
from ..linear_4bit.triton_kernels import fused_backward, fused_forward
from ..nf4.triton_aot import meta_weight
from .triton_adapter import da, shrink, t_and_db
from .triton_kernels import forward

_N, _K, _R = 14336, 4096, 16


def _adapter(rows: int, dtype: torch.dtype, p: float, rank: int = _R) -> None:
    """The kernels around the base GEMM."""
    x, dy = torch.empty(rows, _K, dtype=torch.bfloat16), torch.empty(rows, _N, dtype=torch.bfloat16)
    lora_A, lora_B = torch.empty(rank, _K, dtype=dtype), torch.empty(_N, rank, dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64) if p else None
    s = shrink(x, lora_A, p, seed)
    t, _ = t_and_db(dy, lora_B, s, 2.0, True, True)
    assert t is not None
    da(x, t, lora_A, p, seed)
    term = LowRank(t, lora_A, 1.0, p, seed)
    expand(x, [term])
    expand_add(x, term)


def _terms(rows: int, dtype: torch.dtype, p: float) -> tuple[LowRank, LowRank]:
    """The low-rank terms of the forward and of the backward pass."""
    left = torch.empty(rows, _R)
    seed = torch.empty(1, dtype=torch.int64) if p else None
    forward = LowRank(left, torch.empty(_N, _R, dtype=dtype).t(), 2.0)
    return forward, LowRank(left, torch.empty(_R, _K, dtype=dtype), 1.0, p, seed)


def _fused(rows: int, dtype: torch.dtype, p: float) -> None:
    for_y, for_dx = _terms(rows, dtype, p)
    fused_forward(torch.empty(rows, _K, dtype=torch.bfloat16), meta_weight(_N, _K), None, for_y)
    fused_backward(torch.empty(rows, _N, dtype=torch.bfloat16), meta_weight(_N, _K), for_dx)


def _decode(rows: int, dtype: torch.dtype, layout: str) -> None:
    """A few rows, one adapter without dropout."""
    x = torch.empty(rows, _K, dtype=torch.bfloat16)
    lora_A, lora_B = torch.empty(_R, _K, dtype=dtype), torch.empty(_N, _R, dtype=dtype)
    forward(x, meta_weight(_N, _K, layout=layout), None, [lora_A], [lora_B], [2.0], [0.0], None)


def _adapter_float32(rank: int) -> None:
    """The kernels around the base GEMM when everything is float32."""
    x, dy = torch.empty(1024, _K), torch.empty(1024, _N)
    lora_A, lora_B = torch.empty(rank, _K), torch.empty(_N, rank)
    t, _ = t_and_db(dy, lora_B, shrink(x, lora_A, 0.0, None), 2.0, True, True)
    assert t is not None
    da(x, t, lora_A, 0.0, None)
    expand_add(x, LowRank(t, lora_A))


def cases() -> Iterator[Case]:
    """Training and decoding; adapters of the model's dtype and of float32; with dropout and without."""
    bf16, fp32 = torch.bfloat16, torch.float32
    yield Case("adapter M=8192 bf16", 8192, lambda: _adapter(8192, bf16, 0.0))
    yield Case("adapter M=8192 fp32 dropout", 8192, lambda: _adapter(8192, fp32, 0.1))
    yield Case("adapter M=8192 r=64 bf16", 8192, lambda: _adapter(8192, bf16, 0.0, 64))
    yield Case("adapter M=8192 r=64 fp32 dropout", 8192, lambda: _adapter(8192, fp32, 0.1, 64))
    yield Case("adapter M=1 bf16", 1, lambda: _adapter(1, bf16, 0.0))
    yield Case("adapter M=1024 r=64 all fp32", 0, lambda: _adapter_float32(64))
    for rows in (1, 16):
        yield Case(f"decode M={rows} bf16", rows, partial(_decode, rows, bf16, "bnb"))
    yield Case("decode M=1 bf16 tiled", 1, lambda: _decode(1, bf16, "tiled"))
    yield Case("decode M=16 fp32 tiled", 16, lambda: _decode(16, fp32, "tiled"))
    for rows in (1, 64):
        yield Case(f"fused M={rows} bf16", rows, partial(_fused, rows, bf16, 0.0))
    for rows in (16, 64, 256):
        yield Case(f"fused M={rows} fp32 dropout", rows, partial(_fused, rows, fp32, 0.1))
