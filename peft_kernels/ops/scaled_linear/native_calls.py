"""Scaled, biased linear layers on the native core: scales inside the fused 4-bit kernels, or a pass beside the GEMM."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import native
from ...weight4bit import Weight4bit
from ..linear_4bit import native_calls as base
from ..linear_4bit.native_calls import row_major


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
    w = base.decode(weight, x.dtype) if isinstance(weight, Weight4bit) else weight
    y = unscaled = F.linear(x, w, None if bias is None else bias.to(x.dtype))
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
    need_dx: bool,
    need_sums: bool,
    need_dscale: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dy (M, N) -> dx (M, K), column sums of dy (N,), gradient of the scale; the last two float32. None if not needed.

    saved: x for a feed-forward layer, else the unscaled output; read for the gradient of the scale alone.
    """
    dy, scale = row_major(dy), _float32(scale)
    saved = None if saved is None else row_major(saved)
    fused = isinstance(weight, Weight4bit) and base.fused_backward(dy.shape[0], dy.dtype, weight)
    if is_feedforward:
        sums, _ = columns(dy, sums=need_sums)
        if not (need_dx or need_dscale):
            return None, sums, None
        dx = _product(dy, weight, None, fused)
        _, dscale = columns(dx, times=saved if need_dscale else None, scale=scale, out=dx if need_dx else None)
        return dx if need_dx else None, sums, dscale
    scaled = dy
    if scale is not None and need_dx and not fused:
        scaled = torch.empty_like(dy)
    sums, dscale = columns(
        dy,
        times=saved if need_dscale else None,
        scale=scale,
        out=None if scaled is dy else scaled,
        sums=need_sums,
    )
    return _product(scaled, weight, scale, fused) if need_dx else None, sums, dscale


def _product(
    dy: torch.Tensor, weight: torch.Tensor | Weight4bit, scale: torch.Tensor | None, fused: bool
) -> torch.Tensor:
    """dy W; the fused kernel scales the rows of W as it decodes them, for the others dy comes scaled."""
    if not isinstance(weight, Weight4bit):
        return dy @ weight
    return base.backward_fused(dy, weight, [], scale) if fused else dy @ base.decode(weight, dy.dtype)


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
