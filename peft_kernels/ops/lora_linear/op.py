"""LoRA linear layer: the public function, its autograd Function and its library operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ... import dispatch
from ...autograd import once_differentiable
from ...checks import autocasts
from ...dropout import draw_seeds
from ...weight4bit import Weight4bit, check_base, join_base, split_base
from ..linear_4bit.op import linear_4bit
from . import reference
from .adapters import Adapters

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "lora_linear_forward(Tensor x, Tensor[] weight, int[] meta, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "float[] scaling, float[] dropout_p, Tensor? seeds, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor[] weight, int[] meta, Tensor s, Tensor[] lora_A, "
    "Tensor[] lora_B, float[] scaling, float[] dropout_p, Tensor? seeds, bool[] needs, str backend) -> Tensor[]"
)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """Linear layer with LoRA adapters: Y = x W^T + b + sum_i s_i (drop_i(x) A_i^T) B_i^T.

    Backward, with T_i = s_i dY B_i and S_i = drop_i(x) A_i^T:
    dX = dY W + sum_i mask_i * (T_i A_i), dA_i = T_i^T drop_i(x), dB_i = s_i dY^T S_i, db = sum dY.

    Args:
        x: (..., K) bfloat16, float16 or float32; any strides.
        weight: (N, K) of x's dtype, or a Weight4bit of shape (N, K). A dense weight may be trained too.
        lora_A: (r, K), lora_B: (N, r), of any floating dtype; or sequences of them, one for each active adapter, with
            `scaling`, `lora_bias` and `dropout_p` given once for all or one for each. Any ranks r >= 1.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; a tensor of one number is multiplied into B.
        bias: (N,) or None. lora_bias: (N,) or None, the bias of B (scaled like B's output).
        dropout_p: probability of zeroing an element of x on the adapter's branch while `training`. The mask comes from
            torch's generator by way of one seed per adapter: it repeats under torch.manual_seed and under activation
            checkpointing, and is regenerated in backward, never stored.

    Returns:
        Tensor: (..., N) of x's dtype, accumulated in float32. Under autocast, of the autocast dtype.

    Saved for backward: x (only if some A or a dense W needs a gradient) and S (tokens, sum r) float32.

    Raises:
        TypeError: weight is neither kind. ValueError: a shape, dtype, device, count or probability does not fit.
        BackendError: the backend asked for by name cannot run this call.

    Source: LoRA, arXiv:2106.09685, equation 3; QLoRA, arXiv:2305.14314, equation 5; rsLoRA, arXiv:2312.03732.
    """
    adapters = Adapters.parse(lora_A, lora_B, scaling, lora_bias, dropout_p, training)
    out_features, in_features = check_base(x, weight, bias)
    device = x.device
    adapters.check(out_features, in_features, device)
    if not adapters.lora_A:
        if isinstance(weight, Weight4bit):
            return linear_4bit(x, weight, bias)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if autocasts(device):
        x = x.to(torch.get_autocast_dtype(device.type))
        weight = weight.to(x.dtype) if isinstance(weight, torch.Tensor) else weight
    tensors = [*adapters.lora_A, *adapters.lora_B]
    base = weight if isinstance(weight, torch.Tensor) else weight.packed
    learned = (x, bias, base, *tensors, *adapters.lora_bias)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    call = x, weight, differentiated, adapters.dropout_p
    backend = dispatch.choose("lora_linear", device, (x.dtype, *[t.dtype for t in tensors]), call=call)
    seeds = draw_seeds(adapters.dropout_p, device)
    if backend == "reference":
        return reference.with_seeds(x, weight, adapters, bias, seeds)
    bias = adapters.add_bias(bias)
    observed = dispatch.observed(x, bias, base, *tensors)
    adapter_args = adapters.scaling, adapters.dropout_p, seeds, backend
    if differentiated:
        as_parts = isinstance(weight, torch.Tensor) or torch.compiler.is_compiling()
        parts, meta = split_base(weight) if as_parts else ([], [])
        static = (None if parts else weight, len(parts), meta, observed, adapters.scaling, adapters.dropout_p, backend)
        return _LoRALinear.apply(static, x, bias, seeds, *parts, *adapters.lora_A, *adapters.lora_B)
    if observed:
        y, _ = torch.ops.peft_kernels.lora_linear_forward(
            x, *split_base(weight), bias, adapters.lora_A, adapters.lora_B, *adapter_args
        )
    else:
        y, _ = _forward(x, weight, bias, adapters.lora_A, adapters.lora_B, *adapter_args)
    return y


class _LoRALinear(torch.autograd.Function):
    """static: (4-bit weight or None, how many parts of a weight are among the tensors, meta, observed, ...).

    A 4-bit weight comes as its parts where the compiler has to see them; else as it is, and nothing of it is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, static: tuple, x: torch.Tensor, bias: Any, seeds: torch.Tensor | None, *tensors: torch.Tensor
    ):
        weight, n_parts, meta, observed, scaling, dropout_p, backend = static
        n = len(scaling)
        parts, lora_A, lora_B = list(tensors[:n_parts]), tensors[n_parts : n_parts + n], tensors[n_parts + n :]
        adapters = bias, lora_A, lora_B, scaling, dropout_p, seeds, backend
        if observed:
            parts, meta = (parts, meta) if weight is None else split_base(weight)
            y, s = torch.ops.peft_kernels.lora_linear_forward(x, parts, meta, *adapters)
        else:
            y, s = _forward(x, parts[0] if weight is None else weight, *adapters)
        train_weight_or_A = any(ctx.needs_input_grad[4 : 4 + n_parts + n])
        ctx.save_for_backward(x if train_weight_or_A else None, s, seeds, *tensors)
        ctx.static, ctx.bias_dtype = static, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        weight, n_parts, meta, _, scaling, dropout_p, backend = ctx.static
        n = len(scaling)
        x, s, seeds, *tensors = ctx.saved_tensors
        parts, lora_A, lora_B = tensors[:n_parts], tensors[n_parts : n_parts + n], tensors[n_parts + n :]
        need = ctx.needs_input_grad
        needs = [need[1], any(need[4 + n_parts : 4 + n_parts + n]), any(need[4 + n_parts + n :])]
        dy = dy.contiguous()
        adapters = s, lora_A, lora_B, scaling, dropout_p, seeds, needs, backend
        if dispatch.observed(dy):
            parts, meta = (parts, meta) if weight is None else split_base(weight)
            dx, *grads = torch.ops.peft_kernels.lora_linear_backward(dy, x, parts, meta, *adapters)
        else:
            dx, *grads = _backward(dy, x, join_base(parts, meta) if weight is None else weight, *adapters)
        dA = grads[:n] if needs[1] else [None] * n
        dB = grads[-n:] if needs[2] else [None] * n
        dparts = [None] * n_parts
        rows = dy.view(-1, dy.shape[-1])
        if n_parts and need[4]:
            dparts[0] = rows.t() @ x.reshape(-1, x.shape[-1])
        dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need[2] else None
        return None, dx if needs[0] else None, dbias, None, *dparts, *dA, *dB


def _forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seeds, backend):
    if x.numel() == 0:
        y, s = _forward_fake(x, None, None, bias, lora_A, lora_B, scaling, dropout_p, seeds, backend)
        return y.zero_() if bias is None else y.copy_(bias), s.zero_()
    run = dispatch.implementation("lora_linear", backend).forward
    if x.ndim == 2:
        return run(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seeds)
    y, s = run(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling, dropout_p, seeds)
    y.resize_(*x.shape[:-1], y.shape[1])  # unlike a view, it may be changed in place after autograd has seen it
    return y, s


@torch.library.impl(_lib, "lora_linear_forward", "CompositeExplicitAutograd")
def _forward_op(x, parts, meta, *args):
    return _forward(x, join_base(parts, meta), *args)


@torch.library.register_fake("peft_kernels::lora_linear_forward", lib=_lib)
def _forward_fake(x, parts, meta, bias, lora_A, lora_B, scaling, dropout_p, seeds, backend):
    rank = sum(a.shape[0] for a in lora_A)
    y = x.new_empty((*x.shape[:-1], lora_B[0].shape[0]))
    return y, x.new_empty((math.prod(x.shape[:-1]), rank), dtype=torch.float32)


def _backward(dy, x, weight, s, lora_A, lora_B, scaling, dropout_p, seeds, needs, backend):
    if dy.numel() == 0:
        outs = _backward_fake(dy, x, None, None, s, lora_A, lora_B, scaling, dropout_p, seeds, needs, backend)
        return [out.zero_() for out in outs]
    rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    x = x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1])
    run = dispatch.implementation("lora_linear", backend).backward
    dx, dA, dB = run(rows, x, weight, s, lora_A, lora_B, scaling, dropout_p, seeds, *needs)
    if dx is None:
        dx = dy.new_empty(0)
    elif dy.ndim != 2:
        dx.resize_(*dy.shape[:-1], dx.shape[1])
    return [dx, *(dA if needs[1] else []), *(dB if needs[2] else [])]


@torch.library.impl(_lib, "lora_linear_backward", "CompositeExplicitAutograd")
def _backward_op(dy, x, parts, meta, *args):
    return _backward(dy, x, join_base(parts, meta), *args)


@torch.library.register_fake("peft_kernels::lora_linear_backward", lib=_lib)
def _backward_fake(dy, x, parts, meta, s, lora_A, lora_B, scaling, dropout_p, seeds, needs, backend):
    dx = dy.new_empty((*dy.shape[:-1], lora_A[0].shape[1]) if needs[0] else (0,))
    dA = [torch.empty_like(a) for a in lora_A] if needs[1] else []
    dB = [torch.empty_like(b) for b in lora_B] if needs[2] else []
    return [dx, *dA, *dB]
