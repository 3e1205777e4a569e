"""Scaled, biased linear layers on the GPU: a scale inside the fused 4-bit kernel, else a pass beside the GEMM."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...triton_common import why_not_tensors
from ...weight4bit import Weight4bit
from ..linear_4bit import triton_kernels as base
from ..linear_4bit.triton_vendor import vendor_forward
from . import passes
from .triton_columns import columns


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (M, K), M >= 1 -> y (M, N), and the unscaled output (M, N) if it is to be kept."""
    x, scale = base.row_major(x), _float32(scale)
    if is_feedforward:
        scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
        columns(x, scale=scale, out=scaled)
        x, scale = scaled, None
    if isinstance(weight, Weight4bit) and base.fused(x, weight):
        if not keep:
            return base.fused_forward(x, weight, bias, None, scale), None
        y = base.fused_forward(x, weight, bias, None)  # few rows: y is still in L2 for the pass below
    elif isinstance(weight, Weight4bit):
        y = vendor_forward(x, weight, bias)
    else:
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if scale is None:
        return y, None
    unscaled, y = y, torch.empty_like(y) if keep else y
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
    """See `passes.backward`; dy is scaled by the pass that sums its columns."""
    dy, saved = base.row_major(dy), None if saved is None else base.row_major(saved)

    def product(dy: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(weight, Weight4bit):
            return dy @ weight
        return base.backward(dy, weight)

    return passes.backward(columns, product, False, dy, saved, _float32(scale), is_feedforward, needs)  # type: ignore


def _float32(scale: torch.Tensor | None) -> torch.Tensor | None:
    """The vector as the kernels read it."""
    return None if scale is None else scale.float().contiguous()
