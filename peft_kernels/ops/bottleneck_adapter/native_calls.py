"""`bottleneck_adapter` on the native core: one call forward, one backward."""

from __future__ import annotations

import torch

from ... import native
from ..linear_4bit.native_calls import row_major
from .activations import activation_code

_Vector = torch.Tensor | None


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: _Vector,
    up_weight: torch.Tensor,
    up_bias: _Vector,
    ln_weight: _Vector,
    ln_bias: _Vector,
    channel: _Vector,
    gate: _Vector,
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
    down, up = row_major(down_weight), row_major(up_weight)
    vectors = _contiguous(down_bias, up_bias, ln_weight, ln_bias, channel, gate)
    m = x.shape[0]
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z_dtype = x.dtype if x.dtype == down.dtype else torch.promote_types(x.dtype, down.dtype)
    y = torch.empty((m, up.shape[0]), dtype=y_dtype)
    z = torch.empty((m, down.shape[0]) if save else (0,), dtype=z_dtype)
    stats = torch.empty((2, m) if ln_weight is not None else (0,), dtype=torch.float32)
    native.core().bottleneck_forward(
        _adapter(down, up, vectors, scaling, activation, dropout_p, seed, add_x),
        _matrix(x),
        m,
        ln_eps,
        _NO_MATRIX if residual is None else _matrix(residual),
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
    down_bias: _Vector,
    up_weight: torch.Tensor,
    up_bias: _Vector,
    ln_weight: _Vector,
    ln_bias: _Vector,
    channel: _Vector,
    gate: _Vector,
    add_x: bool,
    activation: str,
    scaling: float,
    ln_eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """dy (M, N) -> the gradients of x and of the eight parameters, None where not needed."""
    dy = row_major(dy)
    x = None if x is None else row_major(x)
    parameters = (down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias, channel, gate)
    down, up = row_major(down_weight), row_major(up_weight)
    vectors = _contiguous(down_bias, up_bias, ln_weight, ln_bias, channel, gate)
    m, k = dy.shape[0], down.shape[1]
    grads: list[torch.Tensor | None] = [torch.empty((m, k), dtype=x_dtype) if needs[0] else None]
    for parameter, needed in zip(parameters, needs[1:], strict=True):
        wanted = parameter if needed else None
        grads.append(None if wanted is None else torch.empty_like(wanted, memory_format=torch.contiguous_format))
    native.core().bottleneck_backward(
        _adapter(down, up, vectors, scaling, activation, dropout_p, seed, add_x),
        (0, 0, k) if x is None else _matrix(x),
        m,
        _matrix(dy),
        _matrix(z),
        stats.data_ptr(),
        native.dtype_code(x_dtype),
        [0 if grad is None else grad.data_ptr() for grad in grads],
    )
    return grads


_NO_VECTOR, _NO_MATRIX = (0, 0), (0, 0, 0)


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
    rank, in_features = down.shape
    return (
        _matrix(down),
        _matrix(up),
        rank,
        in_features,
        up.shape[0],
        [_NO_VECTOR if t is None else (t.data_ptr(), native.dtype_code(t.dtype)) for t in vectors],
        scaling,
        activation_code(activation),
        dropout_p,
        0 if seed is None else int(seed.item()) % 2**64,
        add_x,
    )


def _matrix(t: torch.Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), native.dtype_code(t.dtype), t.stride(0)


def _contiguous(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]
