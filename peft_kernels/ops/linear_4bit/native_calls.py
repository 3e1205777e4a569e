"""`linear_4bit` on the native core: the fused kernels where they win, else the vendor's product (native_vendor.py).

On a CUDA device: see cuda_calls.py.
"""

from __future__ import annotations

import torch

from ... import native
from ...weight4bit import Weight4bit
from ..nf4.native_calls import native_weight
from . import cuda_calls, native_vendor

# What the fused kernels add to their result before the one rounding: (left, right, scaling) and so on; see csrc.
Term = tuple


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return (native.why_not_cuda if device.type == "cuda" else native.why_not_tensors)(device, dtypes)


why_not_call = cuda_calls.why_not_call


def fused_forward(m: int, dtype: torch.dtype, weight: Weight4bit) -> bool:
    """Whether the fused forward kernel runs at m rows: wherever it can, it is the faster one (bench/results)."""
    supported = native.core().linear_4bit_forward_supported
    return supported(native.dtype_code(dtype), m, weight.shape[1], weight.blocksize)


def fused_backward(m: int, dtype: torch.dtype, weight: Weight4bit) -> bool:
    """Whether the fused backward kernel runs at m rows; as above."""
    supported = native.core().linear_4bit_backward_supported
    return supported(native.dtype_code(dtype), m, weight.shape[1], weight.blocksize)


def forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K), M >= 1 -> (M, N)."""
    if x.is_cuda:
        return cuda_calls.forward(x, weight, bias)
    if fused_forward(x.shape[0], x.dtype, weight):
        return forward_fused(x, weight, bias, [])
    return native_vendor.linear(x, weight, bias)


def backward(dy: torch.Tensor, weight: Weight4bit) -> torch.Tensor:
    """dy (M, N) -> dx (M, K)."""
    if dy.is_cuda:
        raise cuda_calls.refusal("a backward pass")
    if fused_backward(dy.shape[0], dy.dtype, weight):
        return backward_fused(dy, weight, [])
    return native_vendor.product(dy, weight)


def forward_fused(
    x: torch.Tensor,
    weight: Weight4bit,
    bias: torch.Tensor | None,
    terms: list[Term],
    out_scale: torch.Tensor | None = None,
    unscaled: torch.Tensor | None = None,
) -> torch.Tensor:
    """The fused kernel: y = x W^T + b + sum of scaling * S B^T for terms (S, ldS, B, dtype of B, r, scaling).

    out_scale: (N,) float32, multiplies y; unscaled: (M, N) contiguous, takes what y was before that.
    """
    x, bias = row_major(x), native.readable(bias)
    m, n = x.shape[0], weight.shape[0]
    y = x.new_empty((m, n))
    native.core().linear_4bit_forward(
        x.data_ptr(),
        native.dtype_code(x.dtype),
        m,
        x.stride(0),
        native_weight(weight),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else native.dtype_code(bias.dtype),
        terms,
        y.data_ptr(),
        n,
        0 if out_scale is None else out_scale.data_ptr(),
        0 if unscaled is None else unscaled.data_ptr(),
    )
    return y


def backward_fused(
    dy: torch.Tensor, weight: Weight4bit, terms: list[Term], in_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The fused kernel: dx = dy W + sum of mask * (T A) for terms (T, ldT, A, dtype of A, r, dropout_p, seed).

    in_scale: (N,) float32, multiplies the columns of dy.
    """
    dy = row_major(dy)
    m, k = dy.shape[0], weight.shape[1]
    dx = dy.new_empty((m, k))
    native.core().linear_4bit_backward(
        dy.data_ptr(),
        native.dtype_code(dy.dtype),
        m,
        dy.stride(0),
        native_weight(weight),
        terms,
        dx.data_ptr(),
        k,
        0 if in_scale is None else in_scale.data_ptr(),
    )
    return dx


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows (a stride between rows is fine)."""
    stride = x.stride()
    return x if stride[1] == 1 and stride[0] >= x.shape[1] else x.contiguous()
