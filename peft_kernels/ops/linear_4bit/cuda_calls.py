"""`linear_4bit` in CUDA C++: the forward pass of at most 16 rows, with an adapter's part where there is one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ... import native
from ...checks import BackendError
from ...weight4bit import Weight4bit
from ..nf4.native_calls import native_weight

MOST_ROWS = 16  # csrc/cuda/linear_4bit.h


def why_not_call(x: torch.Tensor, weight: Weight4bit, differentiated: bool) -> str | None:
    """Why the kernels do not serve a call with such tensors, or None; None too where they were not built."""
    if differentiated:
        return "its CUDA kernels have no backward pass"
    if x.numel() > MOST_ROWS * weight.shape[1]:
        return f"its CUDA kernels serve at most {MOST_ROWS} rows"
    if weight.layout != "bnb":
        return "its CUDA kernels read bitsandbytes' layout only"
    if x.is_cuda and not _measured(x.device.index):
        return 'its CUDA kernels are measured on H100 alone: use_backend("native") asks for them'
    reason = native.has_cuda() and native.cuda_core().linear_4bit_unsupported(native_weight(weight))
    return f"its CUDA kernels do not serve this weight: {reason}" if reason else None


@functools.cache
def _measured(index: int) -> bool:
    """Whether figures show that these kernels beat Triton's on this device."""
    return torch.cuda.get_device_capability(index) == (9, 0)


def refusal(what: str) -> BackendError:
    """The error of a call that these kernels do not serve."""
    return BackendError(
        f"backend 'native' was asked for and its CUDA kernels serve the forward pass of at most {MOST_ROWS} rows over "
        f'a 4-bit weight, not {what}. Choose another with peft_kernels.use_backend(...), or "auto".'
    )


def forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """y (M, N) = x W^T + b. Capturable: memory comes from torch, nothing waits."""
    view, x, place = checked_weight(weight), checked_rows(x), native.cuda_place(x.device)
    return _multiply(place, x, view, weight.shape[0], bias, None, None, 0.0)


def forward_adapted(
    x: torch.Tensor,
    weight: Weight4bit,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) = x W^T + b + sum of scaling S B^T, S (M, sum r) float32; several adapters are one, side by side."""
    view, x, place = checked_weight(weight), checked_rows(x), native.cuda_place(x.device)
    parts = [_shrink(place, x, a) for a in lora_A]
    if len(parts) == 1:
        s, right, scale = parts[0], lora_B[0], scaling[0]
    else:
        scaled = [b.float() * s_i for b, s_i in zip(lora_B, scaling, strict=True)]
        s, right, scale = torch.cat(parts, dim=1), torch.cat(scaled, dim=1), 1.0
    return _multiply(place, x, view, weight.shape[0], bias, s, right.contiguous(), scale), s


def _multiply(
    place: tuple[int, int],
    x: torch.Tensor,
    view: Any,
    n: int,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """y (M, N) = x W^T + bias + scaling S B^T."""
    core, (m, k) = native.cuda_core(), x.shape
    y = x.new_empty((m, n))
    splits = core.linear_4bit_splits(m, k)
    planes = None if splits == 1 else x.new_empty((splits, m, n), dtype=torch.float32)
    bias = native.readable(bias)
    core.linear_4bit_decode(
        *place,
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
    )
    return y


def _shrink(place: tuple[int, int], x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """S (M, rank) float32 = x A^T."""
    a = aligned(a)
    (m, k), rank = x.shape, a.shape[0]
    if a.stride(0) != k:
        a = a.contiguous()
    s = x.new_empty((m, rank), dtype=torch.float32)
    native.cuda_core().lora_shrink_decode(
        *place,
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
