"""`linear_4bit` in CUDA C++: the forward pass of at most 16 rows, with an adapter's part where there is one.

The kernels were compiled for sm_80, sm_90a and sm_100 and emulated on the CPU; they have not run on a device yet.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import native
from ...checks import BackendError
from ...weight4bit import Weight4bit
from ..nf4.native_calls import native_weight

MOST_ROWS = 16  # csrc/cuda/linear_4bit.h

# How codes become values: by a table in shared memory rather than by byte permutes. Predicted by bench/model.py, not
# measured: permutes are integer instructions, of which a multiprocessor issues half as many as of others.
BY_TABLE = True

# (S (M, rank) float32, B (N, rank), scaling): what `forward` adds before the one rounding.
Term = tuple[torch.Tensor, torch.Tensor, float]


def refusal(what: str) -> BackendError:
    """The error of a call that these kernels do not serve."""
    return BackendError(
        f"backend 'native' was asked for and its CUDA kernels serve the forward pass of at most {MOST_ROWS} rows over "
        f'a 4-bit weight, not {what}. Choose another with peft_kernels.use_backend(...), or "auto".'
    )


def forward(
    x: torch.Tensor,
    weight: Weight4bit,
    bias: torch.Tensor | None,
    term: Term | None = None,
    by_table: bool = BY_TABLE,
) -> torch.Tensor:
    """y (M, N) = x W^T + b + scaling S B^T. Capturable: memory comes from torch, nothing waits."""
    core, view, x = native.cuda_core(), checked_weight(weight), checked_rows(x)
    (m, k), n = x.shape, weight.shape[0]
    index, stream = native.cuda_place(x.device)
    y = x.new_empty((m, n))
    splits = core.linear_4bit_splits(index, m, k, by_table)
    planes = None if splits == 1 else x.new_empty((splits, m, n), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    s, b, scaling = (None, None, 0.0) if term is None else (term[0], term[1].contiguous(), term[2])
    core.linear_4bit_decode(
        index,
        stream,
        x.data_ptr(),
        native.dtype_code(x.dtype),
        m,
        x.stride(0),
        view,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else native.dtype_code(bias.dtype),
        0 if s is None else s.data_ptr(),
        0 if b is None else b.data_ptr(),
        0 if b is None else native.dtype_code(b.dtype),
        0 if b is None else b.shape[1],
        scaling,
        y.data_ptr(),
        0 if planes is None else planes.data_ptr(),
        by_table,
    )
    return y


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """S (M, rank) float32 = x A^T."""
    x, a = checked_rows(x), aligned(a.contiguous())
    (m, k), rank = x.shape, a.shape[0]
    s = x.new_empty((m, rank), dtype=torch.float32)
    index, stream = native.cuda_place(x.device)
    native.cuda_core().lora_shrink_decode(
        index,
        stream,
        x.data_ptr(),
        native.dtype_code(x.dtype),
        m,
        k,
        x.stride(0),
        a.data_ptr(),
        native.dtype_code(a.dtype),
        rank,
        s.data_ptr(),
    )
    return s


def checked_weight(weight: Weight4bit) -> Any:
    """The C++ view of a weight that the kernels serve."""
    view = native_weight(weight)
    if reason := native.cuda_core().linear_4bit_unsupported(view):
        raise refusal(f"this one: {reason}")
    return view


def checked_rows(x: torch.Tensor) -> torch.Tensor:
    """x with at most 16 rows, aligned."""
    if x.shape[0] > MOST_ROWS:
        raise refusal(f"{x.shape[0]} rows")
    return aligned(x)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows that start at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
