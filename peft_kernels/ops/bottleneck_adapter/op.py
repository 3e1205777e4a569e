"""Bottleneck adapter: the public function, its autograd Function and its library operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ... import dispatch
from ...autograd import once_differentiable
from ...checks import autocasts, bad_value, check_input, check_operand, check_probability, check_range, check_tensor
from ...dropout import draw_seeds
from . import reference
from .activations import canonical
from .scaling import Factor, parse_scaling

_PARAMETERS = (
    "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? ln_weight, Tensor? ln_bias, "
    "Tensor? channel, Tensor? gate"
)
_OPTIONS = "bool add_x, str activation, float scaling, float ln_eps, float dropout_p, Tensor? seed"
_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    f"bottleneck_adapter_forward(Tensor x, Tensor? residual, {_PARAMETERS}, {_OPTIONS}, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.define(
    f"bottleneck_adapter_backward(Tensor dy, Tensor? x, Tensor z, Tensor? stats, {_PARAMETERS}, {_OPTIONS}, "
    "ScalarType x_dtype, bool[] needs, str backend) -> Tensor[]"
)


def bottleneck_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: str = "relu",
    scaling: Factor | Sequence[Factor] = 1.0,
    residual: torch.Tensor | None = None,
    ln_weight: torch.Tensor | None = None,
    ln_bias: torch.Tensor | None = None,
    ln_eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """Bottleneck adapter: Y = residual + drop(s * (act(LN(x) Wd^T + bd) Wu^T + bu)).

    Backward, with U the term in parentheses, Z its argument of act, dU = s * mask * dY and dZ = act'(Z) * (dU Wu):
    dWu = dU^T act(Z), dWd = dZ^T LN(x), dX = LN'(dZ Wd), ds = sum of mask * dY * U over what shares the factor.

    Args:
        x: (..., K) bfloat16, float16 or float32 (float64 on the reference path); any strides.
        down_weight: (r, K), down_bias: (r,) or None, up_weight: (N, r), up_bias: (N,) or None; of any floating dtype.
        activation: relu, gelu, gelu_tanh (gelu_new), silu (swish), leaky_relu (leakyrelu), tanh, sigmoid, relu2, relu6,
            quick_gelu, mish or identity.
        scaling: a float; a tensor of one element (a learned scalar) or of shape (N,) (one per channel); a tensor that
            broadcasts to (..., 1) (a gate per row, DropPath); or a sequence of these, which are multiplied.
        residual: (..., N) of any floating dtype, or None for none. It may be x itself, which then is read once.
        ln_weight: (K,) to apply layer norm with ln_eps to x first, ln_bias: (K,) or None.
        dropout_p: probability of zeroing an element of the scaled up-projection while `training`. The mask is
            regenerated in backward from one seed of torch's generator, never stored.

    Returns:
        Tensor: (..., N) of x's dtype (promoted with the residual's), accumulated in float32. Under autocast, x and
        both weights are cast to the autocast dtype first; the layer norm is taken of x as it came, by torch where that
        is of another dtype.

    Saved for backward: x (only where its gradient with layer norm or a gradient of the down-projection is needed), Z
    (tokens, r) in the dtype that x and down_weight promote to, and with layer norm mean and 1/std of every row.

    Raises:
        TypeError: an argument is no tensor, number or name. ValueError: a shape, dtype, device, activation or
        probability does not fit. BackendError: the backend asked for by name cannot run this call.

    Source: Houlsby et al., arXiv:1902.00751, section 2.1; Pfeiffer et al., arXiv:2005.00247; He et al.,
    arXiv:2110.04366, equation 4 and table 1 (parallel and scaled); Steitz and Roth, arXiv:2406.06820 (Adapter+).
    """
    activation = canonical(activation)
    weights = (down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias)
    out_features = _check(x, *weights, residual, ln_eps, dropout_p)
    p = float(dropout_p) if training else 0.0
    constant, channel, gate = parse_scaling(scaling, x, out_features)
    device, residual_is_x = x.device, residual is x
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device.type)
        residual_is_x = residual_is_x and x.dtype == dtype
        if ln_weight is not None and x.dtype != dtype:
            # Before the cast, as eager autocast does: of rows far from zero, subtracting the mean would leave little
            # but the cast's rounding. In float32, because torch's on the CPU takes few mixtures of dtypes.
            bias = None if ln_bias is None else ln_bias.float()
            x = F.layer_norm(x.float(), ln_weight.shape, ln_weight.float(), bias, ln_eps)
            ln_weight = ln_bias = None
        x, down_weight, up_weight = x.to(dtype), down_weight.to(dtype), up_weight.to(dtype)
    tensors = (down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias, channel, gate)
    given = [t for t in (x, residual, *tensors) if t is not None]
    backend = dispatch.choose("bottleneck_adapter", device, tuple([t.dtype for t in given]))
    if backend == "reference":
        return reference.bottleneck_adapter(
            x, down_weight, down_bias, up_weight, up_bias, activation=activation, scaling=scaling, residual=residual,
            ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, dropout_p=p,
        )  # fmt: skip
    added = None if residual_is_x else residual
    seed = draw_seeds([p], device) if p > 0 else None
    options = (residual_is_x, activation, constant, float(ln_eps), p)
    observed = dispatch.observed(x, added, *tensors)
    if torch.is_grad_enabled() and True in [t.requires_grad for t in given]:
        return _BottleneckAdapter.apply((options, backend, observed), seed, x, added, *tensors)
    return (_FORWARD if observed else _forward)(x, added, *tensors, *options, seed, False, backend)[0]


def _check(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: Any,
    up_weight: torch.Tensor,
    up_bias: Any,
    ln_weight: Any,
    ln_bias: Any,
    residual: Any,
    ln_eps: float,
    dropout_p: float,
) -> int:
    """N of parameters that fit x and residual."""
    check_tensor("down_weight", down_weight, 2)
    check_tensor("up_weight", up_weight, 2)
    rank, in_features = down_weight.shape
    check_input(x, in_features)
    out_features, device = up_weight.shape[0], x.device
    if rank < 1:
        raise bad_value("down_weight", "a bottleneck of at least 1", rank, "Drop the adapter instead.")
    if ln_weight is None and ln_bias is not None:
        raise bad_value("ln_bias", "None without ln_weight", "a tensor", "Pass ln_weight too.")
    for name, tensor, shape in (
        ("down_weight", down_weight, (rank, in_features)),
        ("down_bias", down_bias, (rank,)),
        ("up_weight", up_weight, (out_features, rank)),
        ("up_bias", up_bias, (out_features,)),
        ("ln_weight", ln_weight, (in_features,)),
        ("ln_bias", ln_bias, (in_features,)),
        ("residual", residual, (*x.shape[:-1], out_features)),
    ):
        if tensor is not None:
            check_operand(name, tensor, shape, device)
    if not (isinstance(ln_eps, float) and ln_eps >= 0 and isinstance(dropout_p, float) and 0 <= dropout_p <= 1):
        check_range("ln_eps", ln_eps, math.inf, "a number of at least 0", "Pass the layer norm's eps.")
        check_probability("dropout_p", dropout_p)
    return out_features


_FORWARD = torch.ops.peft_kernels.bottleneck_adapter_forward
_BACKWARD = torch.ops.peft_kernels.bottleneck_adapter_backward


class _BottleneckAdapter(torch.autograd.Function):
    """static: (options, backend, whether something has to see the library op rather than its result)."""

    @staticmethod
    def forward(ctx: Any, static: tuple, seed: Any, x: torch.Tensor, residual: Any, *tensors: Any):
        options, backend, observed = static
        run = _FORWARD if observed else _forward
        y, z, stats = run(x, residual, *tensors, *options, seed, True, backend)
        keep_x = ctx.needs_input_grad[4] or tensors[4] is not None
        ctx.save_for_backward(x if keep_x else None, z, stats, seed, *tensors)
        ctx.static = options, backend, x.dtype, None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        x, z, stats, seed, *tensors = ctx.saved_tensors
        options, backend, x_dtype, residual_dtype = ctx.static
        _, _, need_x, need_residual, *need = ctx.needs_input_grad
        needs = [need_x, *need]
        grads: list[Any] = [None] * len(needs)
        if True in needs:
            arguments = dy, x, z, stats, *tensors, *options, seed, x_dtype, needs, backend
            if dispatch.observed(*arguments[:12]):
                grads = [grad if needed else None for grad, needed in zip(_BACKWARD(*arguments), needs, strict=True)]
            else:
                grads = _backward(*arguments)
        dx, *rest = grads
        return None, None, dx, dy.to(residual_dtype) if need_residual else None, *rest


def _rows(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.ndim == 2 else t.reshape(-1, t.shape[-1])


def _forward(x, residual, *rest):
    """y; for backward, where wanted, z and the statistics of the layer norm."""
    *arguments, save, backend = rest
    batch = x.shape[:-1]
    if batch.numel() == 0:
        return _forward_fake(x, residual, *rest)
    run = dispatch.implementation("bottleneck_adapter", backend).forward
    y, z, stats = run(_rows(x), _rows(residual), *arguments, save)
    if len(batch) != 1:
        y.resize_(*batch, y.shape[1])  # unlike a view, it may be changed in place after autograd has seen it
    return y, z, stats


@torch.library.impl(_lib, "bottleneck_adapter_forward", "CompositeExplicitAutograd")
def _forward_op(x, residual, down_weight, *rest):
    y, z, stats = _forward(x, residual, down_weight, *rest)
    z = x.new_empty(0, dtype=torch.promote_types(x.dtype, down_weight.dtype)) if z is None else z
    return y, z, x.new_empty(0, dtype=torch.float32) if stats is None else stats


@torch.library.register_fake("peft_kernels::bottleneck_adapter_forward", lib=_lib)
def _forward_fake(x, residual, down_weight, down_bias, up_weight, up_bias, ln_weight, *rest):
    save, batch = rest[-2], x.shape[:-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z_shape = (math.prod(batch), down_weight.shape[0]) if save else (0,)
    stats_shape = (2, math.prod(batch)) if save and ln_weight is not None else (0,)
    return (
        x.new_empty((*batch, up_weight.shape[0]), dtype=dtype),
        x.new_empty(z_shape, dtype=torch.promote_types(x.dtype, down_weight.dtype)),
        x.new_empty(stats_shape, dtype=torch.float32),
    )


def _backward(dy, x, *rest):
    """dx, then a gradient like each parameter; None where not needed."""
    *arguments, needs, backend = rest
    batch = dy.shape[:-1]
    if batch.numel() == 0:
        zeros = [out.zero_() for out in _backward_fake(dy, x, *rest)]
        return [grad if needed else None for grad, needed in zip(zeros, needs, strict=True)]
    dx, *grads = dispatch.implementation("bottleneck_adapter", backend).backward(_rows(dy), _rows(x), *arguments, needs)
    if dx is not None and len(batch) != 1:
        dx.resize_(*batch, dx.shape[1])
    return [dx, *grads]


@torch.library.impl(_lib, "bottleneck_adapter_backward", "CompositeExplicitAutograd")
def _backward_op(dy, *rest):
    return [dy.new_empty(0) if grad is None else grad for grad in _backward(dy, *rest)]


@torch.library.register_fake("peft_kernels::bottleneck_adapter_backward", lib=_lib)
def _backward_fake(dy, x, z, stats, down_weight, *rest):
    """As `_backward`, with an empty tensor where a gradient is not needed."""
    tensors, (x_dtype, needs, _) = (down_weight, *rest[:7]), rest[-3:]
    dx = dy.new_empty((*dy.shape[:-1], down_weight.shape[1]), dtype=x_dtype) if needs[0] else dy.new_empty(0)
    grads = [t.new_empty(t.shape) if needed else dy.new_empty(0) for t, needed in zip(tensors, needs[1:], strict=True)]
    return [dx, *grads]
