"""The calls that are compiled ahead of time for `bottleneck_adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from .triton_kernels import backward, forward

BF16, FP32 = torch.bfloat16, torch.float32


def _train(
    rows: int, k: int, rank: int, dtype: torch.dtype, parameters: torch.dtype, options: bool, activation: str
) -> None:
    """Forward and backward with every gradient; options: layer norm, a gate, channel scaling and dropout."""
    x, dy = torch.empty(rows, k, dtype=dtype), torch.empty(rows, k, dtype=dtype)
    down, up = torch.empty(rank, k, dtype=parameters), torch.empty(k, rank, dtype=parameters)
    down_bias, wide = torch.empty(rank, dtype=parameters), torch.empty(k, dtype=parameters)
    gate = torch.empty(rows, dtype=dtype)
    optional = (wide, wide, wide, gate) if options else (None,) * 4
    adapter = (down, down_bias, up, wide, *optional, True, activation, 1.0, 1e-5)
    dropout = (0.1, torch.empty(1, dtype=torch.int64)) if options else (0.0, None)
    _, z, stats = forward(x, None, *adapter, *dropout, True)  # type: ignore[call-arg]
    needs = [True, True, True, True, True, *[options] * 4]
    backward(dy, x, z, stats, *adapter, *dropout, dtype, needs)  # type: ignore[call-arg]


def _infer(rows: int, k: int, rank: int) -> None:
    x, down = torch.empty(rows, k, dtype=BF16), torch.empty(rank, k, dtype=BF16)
    forward(x, x, down, None, down.t().contiguous(), *(None,) * 5, False, "relu", 4.0, 1e-5, 0.0, None, False)


def cases() -> Iterator[Case]:
    """Houlsby and Pfeiffer adapters in training, the widest that one program takes, wider, float32, and one row."""
    sizes = ((4096, 64, "relu"), (768, 48, "gelu_tanh"), (4096, 128, "gelu"), (4096, 256, "gelu"), (4096, 512, "gelu"))
    for k, rank, activation in sizes:
        for options in (False, True):
            name = f"K={k} r={rank} {activation}{' all options' if options else ''} bf16"
            yield Case(name, 8192, partial(_train, 8192, k, rank, BF16, BF16, options, activation))
    yield Case("K=4096 r=256 M=8192 relu bf16", 8192, lambda: _infer(8192, 4096, 256))
    yield Case("K=4096 r=64 silu fp32 parameters", 0, lambda: _train(8192, 4096, 64, BF16, FP32, False, "silu"))
    yield Case("K=768 r=64 mish all options fp32", 0, lambda: _train(8192, 768, 64, FP32, FP32, True, "mish"))
    yield Case("K=4096 r=64 M=1 relu bf16", 1, lambda: _infer(1, 4096, 64))
