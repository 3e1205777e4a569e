"""Linear layer over a 4-bit weight: the public function, its autograd Function and its library operations."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from ...checks import check_bias, check_device, check_input
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
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    backend = dispatch.choose("linear_4bit", x.device, (x.dtype,))
    if backend == "reference":
        return reference.linear_4bit(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    parts, meta = weight.parts(), weight.meta()
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear4bit.apply(rows, bias, meta, backend, *parts)
    else:
        y = torch.ops.peft_kernels.linear_4bit_forward(rows, parts, meta, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, meta: list, backend: str, *parts: torch.Tensor):
        ctx.save_for_backward(*parts)
        ctx.meta, ctx.backend, ctx.bias_dtype = meta, backend, None if bias is None else bias.dtype
        return torch.ops.peft_kernels.linear_4bit_forward(x, parts, meta, bias, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        parts = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.peft_kernels.linear_4bit_backward(dy.contiguous(), parts, ctx.meta, ctx.backend)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dbias, None, None, *(None for _ in parts)


@torch.library.impl(_lib, "linear_4bit_forward", "CompositeExplicitAutograd")
def _forward(x: torch.Tensor, parts: list[torch.Tensor], meta: list[int], bias: torch.Tensor | None, backend: str):
    if x.shape[0] == 0:
        return x.new_empty((0, meta[0]))
    weight = Weight4bit.from_parts(parts, meta)
    return dispatch.implementation("linear_4bit", backend).forward(x, weight, bias)


@torch.library.register_fake("peft_kernels::linear_4bit_forward", lib=_lib)
def _forward_fake(x: torch.Tensor, parts: list[torch.Tensor], meta: list[int], bias: torch.Tensor | None, backend: str):
    return x.new_empty((x.shape[0], meta[0]))


@torch.library.impl(_lib, "linear_4bit_backward", "CompositeExplicitAutograd")
def _backward(dy: torch.Tensor, parts: list[torch.Tensor], meta: list[int], backend: str):
    if dy.shape[0] == 0:
        return dy.new_empty((0, meta[1]))
    return dispatch.implementation("linear_4bit", backend).backward(dy, Weight4bit.from_parts(parts, meta))


@torch.library.register_fake("peft_kernels::linear_4bit_backward", lib=_lib)
def _backward_fake(dy: torch.Tensor, parts: list[torch.Tensor], meta: list[int], backend: str):
    return dy.new_empty((dy.shape[0], meta[1]))
