"""The autograd Function of scaled, biased linear layers and their library operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import dispatch
from ...autograd import once_differentiable
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
    """x (..., K) -> y (..., N), with a gradient where one is needed; scale: (n,), (n, 1) or (1, n)."""
    dense = isinstance(weight, torch.Tensor)
    parts, meta = split_base(weight) if dense or torch.compiler.is_compiling() else ([], [])
    whole = None if parts else weight
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (scale is not None and scale.requires_grad)
        or (dense and weight.requires_grad)  # type: ignore[union-attr]
    ):
        return _ScaledLinear.apply((whole, meta, is_feedforward, backend), x, bias, scale, *parts)
    return _run_forward(x, whole, parts, meta, bias, _vector(scale), is_feedforward, False, backend)[0]


def _run_forward(x, weight, parts, meta, bias, scale, is_feedforward, keep, backend):
    options = bias, scale, is_feedforward, keep, backend
    if dispatch.observed(x, bias, scale, parts[0] if weight is None else weight.packed):
        parts, meta = (parts, meta) if weight is None else split_base(weight)
        return torch.ops.peft_kernels.scaled_linear_forward(x, parts, meta, *options)
    return _forward(x, join_base(parts, meta) if weight is None else weight, *options)


class _ScaledLinear(torch.autograd.Function):
    """static: (4-bit weight or None, meta, is_feedforward, backend).

    A 4-bit weight comes as its parts where the compiler has to see them; else as it is, and nothing of it is saved.
    """

    @staticmethod
    def forward(ctx: Any, static: tuple, x: torch.Tensor, bias: Any, scale: Any, *parts: torch.Tensor):
        weight, meta, is_feedforward, backend = static
        train_scale, train_weight = ctx.needs_input_grad[3], len(parts) > 0 and ctx.needs_input_grad[4]
        keep = train_scale and not is_feedforward
        ctx.scale_shape = None if scale is None else scale.shape
        scale = _vector(scale)
        y, unscaled = _run_forward(x, weight, list(parts), meta, bias, scale, is_feedforward, keep, backend)
        keep_x = train_weight or (train_scale and is_feedforward)
        ctx.save_for_backward(x if keep_x else None, unscaled if keep else None, scale, *parts)
        ctx.static, ctx.bias_dtype = static, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        weight, meta, is_feedforward, backend = ctx.static
        x, unscaled, scale, *parts = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        dy = dy.contiguous()
        options = scale, is_feedforward, needs, backend
        saved = x if is_feedforward else unscaled
        if dispatch.observed(dy, saved, scale):
            base = (parts, meta) if weight is None else split_base(weight)
            outs = torch.ops.peft_kernels.scaled_linear_backward(dy, saved, *base, *options)
            dx, dbias, dscale = (out if need else None for out, need in zip(outs, needs, strict=True))
        else:
            dx, dbias, dscale = _backward(dy, saved, join_base(parts, meta) if weight is None else weight, *options)
        scales_output = scale is not None and not is_feedforward
        if dbias is not None:
            dbias = (dbias * scale if scales_output else dbias).to(ctx.bias_dtype)
        if dscale is not None:
            dscale = dscale.to(scale.dtype)
            dscale = dscale if ctx.scale_shape == dscale.shape else dscale.view(ctx.scale_shape)
        dparts: list = [None] * len(parts)
        if parts and ctx.needs_input_grad[4]:
            rows = (x * scale).to(x.dtype) if is_feedforward else x
            upstream = (dy * scale if scales_output else dy).to(x.dtype)
            dparts[0] = _rows(upstream).t() @ _rows(rows)
        return None, dx, dbias, dscale, *dparts


def _vector(scale: torch.Tensor | None) -> torch.Tensor | None:
    """(n, 1) or (1, n) -> (n,)."""
    return scale if scale is None or scale.ndim == 1 else scale.reshape(-1)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (M, n); not by -1, which is ambiguous where n = 0."""
    if t.ndim == 2:
        return t
    return t.flatten(0, -2) if t.ndim > 2 else t.unsqueeze(0)


def _forward(x, weight, bias, scale, is_feedforward, keep, backend):
    n = weight.shape[0]
    if x.numel() == 0:
        y = x.new_zeros((*x.shape[:-1], n))
        y = y if bias is None else y + bias.to(y.dtype)
        unscaled = _rows(y) if keep else x.new_empty(0)
        return (y * scale).to(y.dtype) if scale is not None and not is_feedforward else y, unscaled
    implementation = dispatch.implementation("scaled_linear", backend)
    y, unscaled = implementation.forward(_rows(x), weight, bias, scale, is_feedforward, keep)
    if x.ndim != 2:
        y.resize_(*x.shape[:-1], n)  # unlike a view, it may be changed in place after autograd has seen it
    return y, x.new_empty(0) if unscaled is None else unscaled


@torch.library.impl(_lib, "scaled_linear_forward", "CompositeExplicitAutograd")
def _forward_op(x, parts, meta, *args):
    return _forward(x, join_base(parts, meta), *args)


@torch.library.register_fake("peft_kernels::scaled_linear_forward", lib=_lib)
def _forward_fake(x, parts, meta, bias, scale, is_feedforward, keep, backend):
    n = join_base(parts, meta).shape[0]
    unscaled = (math.prod(x.shape[:-1]), n) if keep else (0,)
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(unscaled)


def _backward(dy, saved, weight, scale, is_feedforward, needs, backend):
    """dx, sums of dy and gradient of the scale; None for what is not needed."""
    n, k = weight.shape
    if dy.numel() == 0:
        outs = _gradients(dy, n, k, is_feedforward, needs)
        return tuple(out.zero_() if need else None for out, need in zip(outs, needs, strict=True))
    run = dispatch.implementation("scaled_linear", backend).backward
    dx, *sums = run(_rows(dy), None if saved is None else _rows(saved), weight, scale, is_feedforward, *needs)
    if dx is not None and dy.ndim != 2:
        dx.resize_(*dy.shape[:-1], k)
    return dx, *sums


@torch.library.impl(_lib, "scaled_linear_backward", "CompositeExplicitAutograd")
def _backward_op(dy, saved, parts, meta, *args):
    outs = _backward(dy, saved, join_base(parts, meta), *args)
    return tuple(dy.new_empty(0) if out is None else out for out in outs)


@torch.library.register_fake("peft_kernels::scaled_linear_backward", lib=_lib)
def _backward_fake(dy, saved, parts, meta, scale, is_feedforward, needs, backend):
    return _gradients(dy, *join_base(parts, meta).shape, is_feedforward, needs)


def _gradients(dy, n, k, is_feedforward, needs):
    """Uninitialized dx, sums of dy and gradient of the scale; empty what is not needed."""
    dx = dy.new_empty((*dy.shape[:-1], k) if needs[0] else (0,))
    sums = (n if needs[1] else 0, (k if is_feedforward else n) if needs[2] else 0)
    return dx, *(dy.new_empty(length, dtype=torch.float32 if length else dy.dtype) for length in sums)
