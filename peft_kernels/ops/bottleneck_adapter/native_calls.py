"""`bottleneck_adapter` on the native core: one call forward, one backward."""

from __future__ import annotations

import torch

from ... import native
from ..linear_4bit.native_calls import row_major
from .activations import activation_code

_Vector = torch.Tensor | None
_Matrix = tuple[int, int, int]  # address, dtype, row stride: as csrc/bottleneck_wire.h takes it
_NO_VECTOR, _NO_MATRIX = (0, 0), (0, 0, 0)


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x (M, K) -> y (M, N), the pre-activation (M, r) and, with layer norm, mean and 1 / std of the rows (2, M).

    The latter two are for backward: None unless `save`.
    """
    x, x_matrix = _rows(x)
    vectors = down_bias, up_bias, ln_weight, ln_bias, channel, gate
    kept, adapter = _adapter(down_weight, up_weight, vectors, scaling, activation, dropout_p, seed, add_x)
    added, added_matrix = (None, _NO_MATRIX) if residual is None else _rows(residual)
    m = x.shape[0]
    y_dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    z_dtype = x.dtype if x.dtype == down_weight.dtype else torch.promote_types(x.dtype, down_weight.dtype)
    y = torch.empty((m, up_weight.shape[0]), dtype=y_dtype)
    z = torch.empty((m, down_weight.shape[0]), dtype=z_dtype) if save else None
    stats = None if ln_weight is None else torch.empty((2, m), dtype=torch.float32)
    native.core().bottleneck_forward(
        adapter,
        x_matrix,
        m,
        ln_eps,
        added_matrix,
        y.data_ptr(),
        native.dtype_code(y_dtype),
        0 if z is None else z.data_ptr(),
        native.dtype_code(z_dtype),
        0 if stats is None else stats.data_ptr(),
    )
    del kept
    return y, z, stats if save else None


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    z: torch.Tensor,
    stats: _Vector,
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
    dy, dy_matrix = _rows(dy)
    m, k = dy.shape[0], down_weight.shape[1]
    x, x_matrix = (None, (0, 0, k)) if x is None else _rows(x)
    z, z_matrix = _rows(z)
    vectors = down_bias, up_bias, ln_weight, ln_bias, channel, gate
    kept, adapter = _adapter(down_weight, up_weight, vectors, scaling, activation, dropout_p, seed, add_x)
    grads: list[torch.Tensor | None] = [torch.empty((m, k), dtype=x_dtype) if needs[0] else None]
    parameters = down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias, channel, gate
    for parameter, needed in zip(parameters, needs[1:], strict=True):
        wanted = parameter if needed else None
        grads.append(None if wanted is None else torch.empty_like(wanted, memory_format=torch.contiguous_format))
    native.core().bottleneck_backward(
        adapter,
        x_matrix,
        m,
        dy_matrix,
        z_matrix,
        0 if stats is None else stats.data_ptr(),
        native.dtype_code(x_dtype),
        [0 if grad is None else grad.data_ptr() for grad in grads],
    )
    del kept
    return grads


def _adapter(
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    vectors: tuple[_Vector, ...],
    scaling: float,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    add_x: bool,
) -> tuple[list[torch.Tensor], tuple]:
    """What must outlive the call, and the adapter as csrc/bottleneck_wire.h takes it."""
    down, down_matrix = _rows(down_weight)
    up, up_matrix = _rows(up_weight)
    kept, wired = [down, up], []
    for vector in vectors:
        if vector is None:
            wired.append(_NO_VECTOR)
            continue
        vector = vector.contiguous()
        kept.append(vector)
        wired.append((vector.data_ptr(), native.dtype_code(vector.dtype)))
    rank, in_features = down.shape
    word = 0 if seed is None else int(seed.item()) % 2**64
    code = activation_code(activation)
    return kept, (
        down_matrix, up_matrix, rank, in_features, up.shape[0], wired, scaling, code, dropout_p, word, add_x
    )  # fmt: skip


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, _Matrix]:
    """t with contiguous rows, and as the core takes it."""
    t = row_major(t)
    return t, (t.data_ptr(), native.dtype_code(t.dtype), t.stride(0))
