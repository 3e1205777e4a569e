"""Scaled, biased linear layers on the native core: scales inside the fused 4-bit kernels, or a pass beside the GEMM."""

from __future__ import annotations

import torch

from ... import native
from ...weight4bit import Weight4bit
from ..linear_4bit import native_calls as base
from ..linear_4bit import native_vendor
from ..linear_4bit.native_calls import row_major
from . import passes


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (M, K), M >= 1 -> y (M, N), and the unscaled output (M, N) if it is to be kept."""
    x, scale = row_major(x), _float32(scale)
    if is_feedforward:
        scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
        columns(x, scale=scale, out=scaled)
        x, scale = scaled, None
    if isinstance(weight, Weight4bit) and base.fused_forward(x.shape[0], x.dtype, weight):
        unscaled = x.new_empty((x.shape[0], weight.shape[0])) if keep else None
        return base.forward_fused(x, weight, bias, [], scale, unscaled), unscaled
    y = unscaled = native_vendor.linear(x, weight, bias)
    if scale is not None:
        y = torch.empty_like(y) if keep else y
        columns(unscaled, scale=scale, out=y)
    return y, unscaled if keep else None


def backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    weight: torch.Tensor | Weight4bit,
    scale: torch.Tensor | None,
    is_feedforward: bool,
    *needs: bool,
) -> passes.Gradients:
    """See `passes.backward`; the fused kernel scales the rows of W as it decodes them."""
    dy, saved = row_major(dy), None if saved is None else row_major(saved)
    fused = isinstance(weight, Weight4bit) and base.fused_backward(dy.shape[0], dy.dtype, weight)

    def product(dy: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if fused:
            return base.backward_fused(dy, weight, [], scale)  # type: ignore[arg-type]
        return native_vendor.product(dy, weight)

    return passes.backward(columns, product, fused, dy, saved, _float32(scale), is_feedforward, needs)  # type: ignore


def columns(
    u: torch.Tensor,
    *,
    times: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    sums: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One pass over u (M, N): out = u * scale, column sums of u, and of u * times, float32; what is asked for."""
    total = torch.empty(u.shape[1], dtype=torch.float32) if sums else None
    products = torch.empty(u.shape[1], dtype=torch.float32) if times is not None else None
    if out is not None or sums or times is not None:
        native.core().scale_and_sum_columns(
            u.data_ptr(),
            native.dtype_code(u.dtype),
            *u.shape,
            u.stride(0),
            0 if times is None else times.data_ptr(),
            0 if times is None else times.stride(0),
            0 if scale is None else scale.data_ptr(),
            0 if out is None else out.data_ptr(),
            0 if out is None else out.stride(0),
            0 if total is None else total.data_ptr(),
            0 if products is None else products.data_ptr(),
        )
    return total, products


def _float32(scale: torch.Tensor | None) -> torch.Tensor | None:
    """The vector as the kernels read it."""
    return None if scale is None else scale.float().contiguous()
