"""The autograd Function of scaled, biased linear layers and their library operations."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from ...weight4bit import Weight4bit, join_base, split_base

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "scaled_linear_forward(Tensor x, Tensor[] weight, int[] meta, Tensor? bias, Tensor? scale, bool is_feedforward, "
    "bool keep, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "scaled_linear_backward(Tensor dy, Tensor? saved, Tensor[] weight, int[] meta, Tensor? scale, "
    "bool is_feedforward, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


def apply(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
    backend: str,
) -> torch.Tensor:
    """x (M, K) -> y (M, N), with a gradient where one is needed."""
    parts, meta = split_base(weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, scale, *parts)):
        return _ScaledLinear.apply((meta, is_feedforward, backend), x, bias, scale, *parts)
    return torch.ops.peft_kernels.scaled_linear_forward(x, parts, meta, bias, scale, is_feedforward, False, backend)[0]


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, static: tuple, x: torch.Tensor, bias: Any, scale: Any, *parts: torch.Tensor):
        meta, is_feedforward, backend = static
        train_scale, train_weight = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        keep = train_scale and not is_feedforward
        y, unscaled = torch.ops.peft_kernels.scaled_linear_forward(
            x, parts, meta, bias, scale, is_feedforward, keep, backend
        )
        keep_x = train_weight or (train_scale and is_feedforward)
        ctx.save_for_backward(x if keep_x else None, unscaled if keep else None, scale, *parts)
        ctx.static, ctx.bias_dtype = static, None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        meta, is_feedforward, backend = ctx.static
        x, unscaled, scale, *parts = ctx.saved_tensors
        _, *needs, need_weight = ctx.needs_input_grad[:5]
        dx, dbias, dscale = torch.ops.peft_kernels.scaled_linear_backward(
            dy.contiguous(), x if is_feedforward else unscaled, parts, meta, scale, is_feedforward, needs, backend
        )
        scales_output = scale is not None and not is_feedforward
        if needs[1]:
            dbias = (dbias * scale if scales_output else dbias).to(ctx.bias_dtype)
        dweight = None
        if need_weight:
            rows = (x * scale).to(x.dtype) if is_feedforward else x
            dweight = (dy * scale if scales_output else dy).to(x.dtype).t() @ rows
        return (
            None,
            dx if needs[0] else None,
            dbias if needs[1] else None,
            dscale.to(scale.dtype) if needs[2] else None,
            dweight,
            *(None for _ in parts[1:]),
        )


@torch.library.impl(_lib, "scaled_linear_forward", "CompositeExplicitAutograd")
def _forward(x, parts, meta, bias, scale, is_feedforward, keep, backend):
    if x.numel() == 0:
        y = x.new_zeros(x.shape[0], join_base(parts, meta).shape[0])
        y = y if bias is None else y + bias.to(y.dtype)
        return (y * scale).to(y.dtype) if scale is not None and not is_feedforward else y, y if keep else x.new_empty(0)
    implementation = dispatch.implementation("scaled_linear", backend)
    y, unscaled = implementation.forward(x, join_base(parts, meta), bias, scale, is_feedforward, keep)
    return y, x.new_empty(0) if unscaled is None else unscaled


@torch.library.register_fake("peft_kernels::scaled_linear_forward", lib=_lib)
def _forward_fake(x, parts, meta, bias, scale, is_feedforward, keep, backend):
    shape = (x.shape[0], join_base(parts, meta).shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@torch.library.impl(_lib, "scaled_linear_backward", "CompositeExplicitAutograd")
def _backward(dy, saved, parts, meta, scale, is_feedforward, needs, backend):
    weight = join_base(parts, meta)
    if dy.shape[0] == 0:
        return tuple(
            out.zero_() for out in _backward_fake(dy, saved, parts, meta, scale, is_feedforward, needs, backend)
        )
    results = dispatch.implementation("scaled_linear", backend).backward(
        dy, saved, weight, scale, is_feedforward, *needs
    )
    return tuple(dy.new_empty(0) if result is None else result for result in results)


@torch.library.register_fake("peft_kernels::scaled_linear_backward", lib=_lib)
def _backward_fake(dy, saved, parts, meta, scale, is_feedforward, needs, backend):
    n, k = join_base(parts, meta).shape
    dx = dy.new_empty((dy.shape[0], k) if needs[0] else 0)
    sums = (n if needs[1] else 0, (k if is_feedforward else n) if needs[2] else 0)
    return dx, *(dy.new_empty(length, dtype=torch.float32 if length else dy.dtype) for length in sums)
