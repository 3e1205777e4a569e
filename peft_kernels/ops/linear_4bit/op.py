"""Linear layer over a 4-bit weight: the public function, its autograd Function and its library operations."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from ...autograd import once_differentiable
from ...checks import autocasts, check_bias, check_device, check_input
from ...weight4bit import Weight4bit, check_weight4bit
from . import reference

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define("linear_4bit_forward(Tensor x, Tensor[] weight, int[] meta, Tensor? bias, str backend) -> Tensor")
_lib.define("linear_4bit_backward(Tensor dy, Tensor[] weight, int[] meta, str backend) -> Tensor")


def linear_4bit(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer over a frozen 4-bit weight: Y = x W^T + b, and backward dX = dY W, db = sum dY.

    Args:
        x: (..., K) bfloat16, float16 or float32 (float64 on the reference path); any strides.
        weight: Weight4bit of shape (N, K). It is decoded to x's dtype, inside the kernel's tile where M is small.
        bias: (N,) of any floating dtype, or None.

    Returns:
        Tensor: (..., N) of x's dtype, accumulated in float32, rounded once. Under autocast, of the autocast dtype.

    Nothing but the packed weight is saved for backward.

    Raises:
        TypeError: weight is no Weight4bit. ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this call.

    Source: QLoRA, arXiv:2305.14314, equation 5 without its adapter.
    """
    check_weight4bit(weight)
    check_input(x, weight.shape[1])
    check_device("weight", weight.packed, x.device)
    check_bias(bias, weight.shape[0], x.device)
    if autocasts(x.device):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    differentiated = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    backend = dispatch.choose("linear_4bit", x.device, (x.dtype,), call=(x, weight, differentiated))
    if backend == "reference":
        return reference.linear_4bit(x, weight, bias)
    if differentiated:
        if torch.compiler.is_compiling():
            return _Linear4bit.apply((None, weight.meta(), backend), x, bias, *weight.parts())
        return _Linear4bit.apply((weight, None, backend), x, bias)
    return _run_forward(x, weight, bias, backend)


def _run_forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    if dispatch.observed(x, bias, weight.packed):
        return torch.ops.peft_kernels.linear_4bit_forward(x, weight.parts(), weight.meta(), bias, backend)
    return _forward(x, weight, bias, backend)


class _Linear4bit(torch.autograd.Function):
    """static: (weight, None, backend), or, where the compiler has to see the parts, (None, meta, backend) and those."""

    @staticmethod
    def forward(ctx: Any, static: tuple, x: torch.Tensor, bias: torch.Tensor | None, *parts: torch.Tensor):
        weight, meta, backend = static
        ctx.save_for_backward(*parts)
        ctx.static, ctx.bias_dtype = static, None if bias is None else bias.dtype
        if weight is None:
            return torch.ops.peft_kernels.linear_4bit_forward(x, parts, meta, bias, backend)
        return _run_forward(x, weight, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        weight, meta, backend = ctx.static
        parts = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[1]:
            dy = dy.contiguous()
            if weight is None:
                dx = torch.ops.peft_kernels.linear_4bit_backward(dy, parts, meta, backend)
            elif dispatch.observed(dy):
                dx = torch.ops.peft_kernels.linear_4bit_backward(dy, weight.parts(), weight.meta(), backend)
            else:
                dx = _backward(dy, weight, backend)
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return None, dx, dbias, *(None for _ in parts)


def _forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    n, k = weight.shape
    if x.numel() == 0:
        y = x.new_zeros((*x.shape[:-1], n))
        return y if bias is None else y.copy_(bias)
    if x.ndim == 2:
        return dispatch.implementation("linear_4bit", backend).forward(x, weight, bias)
    y = dispatch.implementation("linear_4bit", backend).forward(x.reshape(-1, k), weight, bias)
    return y.resize_(*x.shape[:-1], n)  # unlike a view, it may be changed in place after autograd has seen it


def _backward(dy: torch.Tensor, weight: Weight4bit, backend: str) -> torch.Tensor:
    n, k = weight.shape
    if dy.numel() == 0:
        return dy.new_zeros((*dy.shape[:-1], k))
    if dy.ndim == 2:
        return dispatch.implementation("linear_4bit", backend).backward(dy, weight)
    dx = dispatch.implementation("linear_4bit", backend).backward(dy.reshape(-1, n), weight)
    return dx.resize_(*dy.shape[:-1], k)


@torch.library.impl(_lib, "linear_4bit_forward", "CompositeExplicitAutograd")
def _forward_op(x: torch.Tensor, parts: list[torch.Tensor], meta: list[int], bias: torch.Tensor | None, backend: str):
    return _forward(x, Weight4bit.from_parts(parts, meta), bias, backend)


@torch.library.register_fake("peft_kernels::linear_4bit_forward", lib=_lib)
def _forward_fake(x: torch.Tensor, parts: list[torch.Tensor], meta: list[int], bias: torch.Tensor | None, backend: str):
    return x.new_empty((*x.shape[:-1], meta[0]))


@torch.library.impl(_lib, "linear_4bit_backward", "CompositeExplicitAutograd")
def _backward_op(dy: torch.Tensor, parts: list[torch.Tensor], meta: list[int], backend: str):
    return _backward(dy, Weight4bit.from_parts(parts, meta), backend)


@torch.library.register_fake("peft_kernels::linear_4bit_backward", lib=_lib)
def _backward_fake(dy: torch.Tensor, parts: list[torch.Tensor], meta: list[int], backend: str):
    return dy.new_empty((*dy.shape[:-1], meta[1]))
