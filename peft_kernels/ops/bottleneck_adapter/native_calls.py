"""`bottleneck_adapter` on the native core: one call forward, one backward."""

from __future__ import annotations

import torch

from ... import native
from ..linear_4bit.native_calls import row_major
from .activations import activation_code

_Floats = torch.Tensor | None


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: _Floats,
    up_weight: torch.Tensor,
    up_bias: _Floats,
    ln_weight: _Floats,
    ln_bias: _Floats,
    channel: _Floats,
    gate: _Floats,
    add_x: bool,
    activation: str,
    scaling: float,
    ln_eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (M, K) -> y (M, N), the pre-activation (M, r), mean and 1 / std of the rows (2, M)."""
    x = row_major(x)
    residual = None if residual is None else row_major(residual)
    vectors = [_floats(t) for t in (down_bias, up_bias, ln_weight, ln_bias, channel, gate)]
    m = x.shape[0]
    weights = row_major(down_weight), row_major(up_weight)
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z_dtype = torch.promote_types(x.dtype, down_weight.dtype)
    y = x.new_empty((m, up_weight.shape[0]), dtype=y_dtype)
    z = x.new_empty((m, down_weight.shape[0]) if save else (0,), dtype=z_dtype)
    stats = x.new_empty((2, m) if ln_weight is not None else (0,), dtype=torch.float32)
    native.core().bottleneck_forward(
        _adapter(*weights, vectors, scaling, activation, dropout_p, seed, add_x),
        _matrix(x),
        m,
        ln_eps,
        (0, 0, 0) if residual is None else _matrix(residual),
        y.data_ptr(),
        native.dtype_code(y_dtype),
        z.data_ptr() if save else 0,
        native.dtype_code(z_dtype),
        stats.data_ptr(),
    )
    return y, z, stats if save else stats.new_empty(0)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    z: torch.Tensor,
    stats: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: _Floats,
    up_weight: torch.Tensor,
    up_bias: _Floats,
    ln_weight: _Floats,
    ln_bias: _Floats,
    channel: _Floats,
    gate: _Floats,
    add_x: bool,
    activation: str,
    scaling: float,
    ln_eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> list[torch.Tensor]:
    """dy (M, N) -> the gradients of x and of the eight parameters, empty where not needed."""
    dy = row_major(dy)
    x = None if x is None else row_major(x)
    parameters = (down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias, channel, gate)
    vectors = [_floats(t) for t in (down_bias, up_bias, ln_weight, ln_bias, channel, gate)]
    m, k = dy.shape[0], down_weight.shape[1]
    grads = [dy.new_empty((m, k) if needs[0] else (0,), dtype=x_dtype)]
    for parameter, needed in zip(parameters, needs[1:], strict=True):
        if parameter is None or not needed:
            grads.append(dy.new_empty(0))
        else:
            dtype = parameter.dtype if parameter.ndim == 2 else torch.float32
            grads.append(parameter.new_empty(parameter.shape, dtype=dtype))
    native.core().bottleneck_backward(
        _adapter(row_major(down_weight), row_major(up_weight), vectors, scaling, activation, dropout_p, seed, add_x),
        (0, 0, k) if x is None else _matrix(x),
        m,
        _matrix(dy),
        _matrix(z),
        stats.data_ptr(),
        native.dtype_code(x_dtype),
        [grad.data_ptr() if needed else 0 for grad, needed in zip(grads, needs, strict=True)],
    )
    like = (None, *parameters)
    return [
        grad if t is None or not needed else grad.to(t.dtype)
        for grad, t, needed in zip(grads, like, needs, strict=True)
    ]


def _adapter(
    down: torch.Tensor,
    up: torch.Tensor,
    vectors: list[torch.Tensor | None],
    scaling: float,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    add_x: bool,
) -> tuple:
    """The adapter as csrc/bottleneck_wire.h takes it."""
    return (
        _matrix(down),
        _matrix(up),
        down.shape[0],
        down.shape[1],
        up.shape[0],
        [0 if t is None else t.data_ptr() for t in vectors],
        scaling,
        activation_code(activation),
        dropout_p,
        0 if seed is None else int(seed.item()) % 2**64,
        add_x,
    )


def _matrix(t: torch.Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), native.dtype_code(t.dtype), t.stride(0)


def _floats(t: torch.Tensor | None) -> torch.Tensor | None:
    """A vector as the kernels take it: its rounding is done once, by whoever uses it."""
    return None if t is None else t.float().contiguous()
