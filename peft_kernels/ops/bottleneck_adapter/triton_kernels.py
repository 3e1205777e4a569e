"""`bottleneck_adapter` on the GPU: one kernel forward; backward one over rows and one per weight over columns."""

from __future__ import annotations

import torch

from ...triton_common import why_not_tensors
from ...triton_common.launch import cdiv, launch, target
from ...triton_common.lowrank import dropout_arguments
from ..linear_4bit.native_calls import row_major
from . import triton_wide
from .activations import activation_code
from .triton_backward import _bottleneck_bwd_kernel
from .triton_columns import column_products
from .triton_finish import finish
from .triton_forward import FOLDED, NO_NORM, NORMED, _bottleneck_fwd_kernel, fold_norm
from .triton_tiles import fused, pieces, tile_for

_Vector = torch.Tensor | None


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


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
    x, down_weight, up_weight = row_major(x), row_major(down_weight), row_major(up_weight)
    added = x if add_x else None if residual is None else row_major(residual)
    vectors = [None if v is None else v.contiguous() for v in (down_bias, up_bias, ln_weight, ln_bias, channel, gate)]
    (m, k), (n, rank) = x.shape, up_weight.shape
    y_dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    z_dtype = torch.promote_types(x.dtype, down_weight.dtype)
    normed = ln_weight is not None
    down_pieces, up_pieces = pieces(down_weight, x, not normed), pieces(up_weight)
    if not fused(rank, down_pieces, up_pieces):
        y, z, stats = triton_wide.forward(
            x, added, down_weight, up_weight, vectors, activation, scaling, ln_eps, dropout_p, seed
        )
        return (y, z.to(z_dtype), stats) if save else (y, z.new_empty(0, dtype=z_dtype), stats.new_empty(0))
    y = torch.empty((m, n), dtype=y_dtype, device=x.device)
    z = torch.empty((m, rank) if save else (0,), dtype=z_dtype, device=x.device)
    stats = torch.empty((2, m) if save and normed else (0,), dtype=torch.float32, device=x.device)
    tile = tile_for(m, rank, max(down_pieces, up_pieces), target(x.device))
    down_bias, _, ln_weight, ln_bias = vectors[:4]
    norm, folded, fold_vectors = NO_NORM.value, None, None
    if ln_weight is not None:
        # x goes to the tensor cores as it is where it has Wd's dtype, in which eager rounds the norm's result
        norm = FOLDED.value if down_pieces == 1 and x.dtype == down_weight.dtype else NORMED.value
        if norm == FOLDED.value:
            folded, fold_vectors = fold_norm(down_weight, down_bias, ln_weight, ln_bias, True)
    launch(
        _bottleneck_fwd_kernel,
        (cdiv(m, tile["BLOCK_M"]),),
        x.device,
        x_ptr=x,
        residual_ptr=added,
        down_ptr=down_weight if folded is None else folded,
        folded_ptr=fold_vectors,
        up_ptr=up_weight,
        **dict(zip(_VECTORS, vectors, strict=True)),
        y_ptr=y,
        z_ptr=z if save else None,
        stats_ptr=stats if save and normed else None,
        M=m,
        K=k,
        N=n,
        rank=rank,
        scaling=scaling,
        eps=ln_eps,
        stride_xm=x.stride(0),
        stride_am=0 if added is None else added.stride(0),
        stride_dr=down_weight.stride(0) if folded is None else k,
        stride_un=up_weight.stride(0),
        NORM=norm,
        EVEN=k % tile["BLOCK"] == 0,
        STAGES=tile["num_stages"],
        **dropout_arguments(dropout_p, seed),
        ACTIVATION=activation_code(activation),
        DOWN_PIECES=down_pieces,
        UP_PIECES=up_pieces,
        **tile,
    )
    return y, z, stats


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
    dy, x = row_major(dy), None if x is None else row_major(x)
    down, up = row_major(down_weight), row_major(up_weight)
    vectors = [None if v is None else v.contiguous() for v in (down_bias, up_bias, ln_weight, ln_bias, channel, gate)]
    stats_or_none = None if ln_weight is None else stats
    rows = _fused_rows if fused(up.shape[1], pieces(down), pieces(up)) else triton_wide.rows
    dx, dz, hidden, dgate = rows(
        dy, x, z, stats_or_none, down, up, vectors, add_x, activation, scaling, dropout_p, seed, x_dtype, needs
    )
    down_bias, up_bias, ln_weight, ln_bias, channel, gate = vectors
    d_down, d_down_bias, d_up, d_up_bias, d_ln_weight, d_ln_bias, d_channel = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and needed else None
        for t, needed in zip((down, down_bias, up, up_bias, ln_weight, ln_bias, channel), needs[1:8], strict=True)
    )
    if needs[3] or needs[4] or needs[7]:
        products = column_products(dy, hidden, up.dtype, None, gate, dropout_p, seed, sums=needs[4] or needs[7])
        out = None if d_up is None else d_up.t()
        finish(products, up.t(), scaling, factor=channel, bias=up_bias, out=out, sums=d_up_bias, weighted=d_channel)
    if needs[1] or needs[5]:
        assert x is not None
        products = column_products(x, dz, down.dtype, stats_or_none, sums=False, by_column=False)
        finish(
            products, down, 1.0, factor=ln_weight, offset=ln_bias, out=d_down, weighted=d_ln_weight,
            t_sums=d_down_bias, offset_sums=d_ln_bias,
        )  # fmt: skip
    elif needs[2] or needs[6]:
        total = dz.sum(0)
        d_down_bias = total.to(d_down_bias.dtype) if d_down_bias is not None else None
        d_ln_bias = (total[:, None] * down.float()).sum(0).to(d_ln_bias.dtype) if d_ln_bias is not None else None
    dgate = None if dgate is None or gate is None else dgate.to(gate.dtype)
    return [dx, d_down, d_down_bias, d_up, d_up_bias, d_ln_weight, d_ln_bias, d_channel, dgate]


_VECTORS = ("down_bias_ptr", "up_bias_ptr", "ln_weight_ptr", "ln_bias_ptr", "channel_ptr", "gate_ptr")


def _fused_rows(dy, x, z, stats, down, up, vectors, add_x, activation, scaling, dropout_p, seed, x_dtype, needs):
    """dx, dz float32 and gate act(z) in Wu's dtype (M, r), dgate (M,) float32; None where not needed."""
    down_bias, up_bias, ln_weight, ln_bias, channel, gate = vectors
    (m, n), (rank, k) = dy.shape, down.shape
    empty = lambda needed, *shape, dtype=torch.float32: (  # noqa: E731
        torch.empty(shape, dtype=dtype, device=dy.device) if needed else None
    )
    dx, dz = empty(needs[0], m, k, dtype=x_dtype), empty(any(needs[i] for i in (1, 2, 5, 6)), m, rank)
    hidden = empty(any(needs[i] for i in (3, 4, 7)), m, rank, dtype=up.dtype)  # as the product rounds it
    dgate = empty(needs[8], m)
    down_pieces, up_pieces = pieces(down), pieces(up, dy, channel is None)
    on = target(dy.device)
    tile = tile_for(m, rank, max(down_pieces, up_pieces), on, backward=True)
    normed = stats is not None and needs[0]
    dropout = dropout_arguments(dropout_p, seed)
    launch(
        _bottleneck_bwd_kernel,
        (cdiv(m, tile["BLOCK_M"]),),
        dy.device,
        dy_ptr=dy,
        x_ptr=x if normed else None,
        z_ptr=z,
        stats_ptr=stats if normed else None,
        down_ptr=down,
        up_ptr=up,
        up_bias_ptr=up_bias,
        ln_weight_ptr=ln_weight if normed else None,
        norm_sums_ptr=fold_norm(down, down_bias, ln_weight, ln_bias, False)[1] if normed else None,
        channel_ptr=channel,
        gate_ptr=gate,
        dx_ptr=dx,
        dz_ptr=dz,
        hidden_ptr=hidden,
        dgate_ptr=dgate,
        M=m,
        K=k,
        N=n,
        rank=rank,
        scaling=scaling * dropout.pop("inverse_keep"),
        stride_ym=dy.stride(0),
        stride_xm=0 if x is None else x.stride(0),
        stride_dr=down.stride(0),
        stride_un=up.stride(0),
        **dropout,
        ADD_X=add_x,
        ACTIVATION=activation_code(activation),
        DOWN_PIECES=down_pieces,
        UP_PIECES=up_pieces,
        STAGES=tile["num_stages"] if tile["RANKS"] == 1 or on.arch == 90 else None,  # it would spill
        **tile,
    )
    return dx, dz, hidden, dgate
