"""`lora_linear` on the native core: skinny GEMMs for the adapters around the fused or the vendor's base GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import native
from ...weight4bit import Weight4bit
from ..linear_4bit import cuda_calls, native_vendor
from ..linear_4bit import native_calls as base
from ..linear_4bit.native_calls import row_major


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return base.why_not(device, dtypes)


def why_not_call(
    x: torch.Tensor, weight: torch.Tensor | Weight4bit, differentiated: bool, dropout_p: Sequence[float]
) -> str | None:
    """Why the CUDA kernels do not serve a call with such tensors, or None."""
    if not isinstance(weight, Weight4bit):
        return "its CUDA kernels serve no dense weight"
    return "its CUDA kernels have no dropout" if any(dropout_p) else base.why_not_call(x, weight, differentiated)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seeds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) -> y (M, N), S (M, sum r) float32."""
    if x.is_cuda:
        return _forward_cuda(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
    x = row_major(x)
    m, ranks = x.shape[0], [a.shape[0] for a in lora_A]
    s = torch.empty((m, sum(ranks)), dtype=torch.float32)
    columns = _columns(s, ranks)
    for a, column, p, seed in zip(lora_A, columns, dropout_p, _seeds(seeds, ranks), strict=True):
        _shrink(x, a.contiguous(), False, 1.0, p, seed, column)
    right = [b.contiguous() for b in lora_B]
    if isinstance(weight, Weight4bit) and base.fused_forward(m, x.dtype, weight):
        terms = [
            (*column, b.data_ptr(), native.dtype_code(b.dtype), rank, scale)
            for column, b, rank, scale in zip(columns, right, ranks, scaling, strict=True)
        ]
        return base.forward_fused(x, weight, bias, terms), s
    y = native_vendor.linear(x, weight, bias)
    added = [
        (*column, b.data_ptr(), native.dtype_code(b.dtype), True, rank, scale, 0.0, 0)
        for column, b, rank, scale in zip(columns, right, ranks, scaling, strict=True)
    ]
    _expand_add(y, added)
    return y, s


def _forward_cuda(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in CUDA C++."""
    if any(dropout_p) or not isinstance(weight, Weight4bit):
        raise cuda_calls.refusal("dropout" if any(dropout_p) else "a dense one")
    return cuda_calls.forward_adapted(x, weight, bias, lora_A, lora_B, scaling)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | Weight4bit,
    s: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seeds: torch.Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
    """dy (M, N) -> dx (M, K) or None, dA and dB in their parameters' dtypes (empty where not needed)."""
    if dy.is_cuda:
        raise cuda_calls.refusal("a backward pass")
    dy = row_major(dy)
    ranks = [a.shape[0] for a in lora_A]
    s, seed_list = s.contiguous(), _seeds(seeds, ranks)
    dA: list[torch.Tensor] = []
    dB: list[torch.Tensor] = []
    dx = None
    if need_dB:
        for column, b, scale in zip(_columns(s, ranks), lora_B, scaling, strict=True):
            dB.append(_wgrad(dy, column, scale, 0.0, 0, False, b))
    if need_dx or need_dA:
        t = torch.empty_like(s)
        columns = _columns(t, ranks)
        for b, column, scale in zip(lora_B, columns, scaling, strict=True):
            _shrink(dy, b.contiguous(), True, scale, 0.0, 0, column)
    if need_dA:
        assert x is not None
        x = row_major(x)
        for a, column, p, seed in zip(lora_A, columns, dropout_p, seed_list, strict=True):
            dA.append(_wgrad(x, column, 1.0, p, seed, True, a))
    if need_dx:
        dx = _grad_x(dy, weight, columns, [a.contiguous() for a in lora_A], dropout_p, seed_list)
    return dx, dA, dB


def _grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    columns: list[Column],
    lora_A: list[torch.Tensor],
    dropout_p: Sequence[float],
    seeds: list[int],
) -> torch.Tensor:
    """dX = dY W + sum of mask * (T A), the adapters' part inside the fused kernel where that runs."""
    adapters = list(zip(columns, lora_A, dropout_p, seeds, strict=True))
    if isinstance(weight, Weight4bit) and base.fused_backward(dy.shape[0], dy.dtype, weight):
        terms: list[tuple] = [
            (*column, a.data_ptr(), native.dtype_code(a.dtype), a.shape[0], p, seed) for column, a, p, seed in adapters
        ]
        return base.backward_fused(dy, weight, terms)
    dx = native_vendor.product(dy, weight)
    terms = [
        (*column, a.data_ptr(), native.dtype_code(a.dtype), False, a.shape[0], 1.0, p, seed)
        for column, a, p, seed in adapters
    ]
    _expand_add(dx, terms)
    return dx


# Some columns of S or T: their address, and the floats from row to row. Slicing a tensor takes as long as ten of these.
Column = tuple[int, int]


def _columns(s: torch.Tensor, ranks: Sequence[int]) -> list[Column]:
    """The columns of S (or T) that belong to each adapter."""
    address, ld, columns = s.data_ptr(), s.shape[1], []
    for rank in ranks:
        columns.append((address, ld))
        address += 4 * rank
    return columns


def _seeds(seeds: torch.Tensor | None, ranks: Sequence[int]) -> list[int]:
    """The seeds as unsigned integers."""
    return [0] * len(ranks) if seeds is None else [seed % 2**64 for seed in seeds.tolist()]


def _shrink(x: torch.Tensor, p: torch.Tensor, p_is_kr: bool, alpha: float, drop: float, seed: int, to: Column) -> None:
    """The columns `to` of S = alpha * drop(x) P^T."""
    native.core().lora_shrink(
        x.data_ptr(),
        native.dtype_code(x.dtype),
        *x.shape,
        x.stride(0),
        p.data_ptr(),
        native.dtype_code(p.dtype),
        p_is_kr,
        p.shape[p_is_kr],
        alpha,
        drop,
        seed,
        *to,
    )


def _wgrad(
    x: torch.Tensor, p: Column, alpha: float, drop: float, seed: int, out_is_ri: bool, like: torch.Tensor
) -> torch.Tensor:
    """alpha * drop(x)^T P, shaped and typed like the parameter it is the gradient of."""
    out = torch.empty(like.shape, dtype=like.dtype)
    native.core().lora_wgrad(
        x.data_ptr(),
        native.dtype_code(x.dtype),
        *x.shape,
        x.stride(0),
        *p,
        like.shape[not out_is_ri],
        alpha,
        drop,
        seed,
        out.data_ptr(),
        native.dtype_code(out.dtype),
        out_is_ri,
    )
    return out


def _expand_add(out: torch.Tensor, terms: list[tuple]) -> None:
    """out += sum of alpha * mask * (S P), rounded once."""
    native.core().lora_expand_add(out.data_ptr(), native.dtype_code(out.dtype), *out.shape, out.stride(0), terms)
