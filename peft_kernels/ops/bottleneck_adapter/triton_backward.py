"""The backward kernels: one over rows (dZ, dX, the gate's gradient), one over columns for the weight gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_common.activation import activate
from ...triton_common.device import dot_wide, dropout_keep
from ...triton_common.launch import launch, target
from ...triton_common.lowrank import block_r, dropout_arguments
from ...triton_common.planes import split_count, sum_planes


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_bwd_kernel(
    dy_ptr, x_ptr, z_ptr, stats_ptr, down_ptr, up_ptr, up_bias_ptr, ln_weight_ptr, hidden_sum_ptr, hidden_bias_ptr,
    channel_ptr, gate_ptr, dx_ptr, dz_ptr, hidden_ptr, dgate_ptr, seed_ptr, M, K, N, rank, scaling, threshold,
    stride_ym, stride_xm, stride_dr, stride_un,
    ADD_X: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    DOWN_PIECES: tl.constexpr, UP_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """dz (M, rank) = s act'(z) ((mask * dY) Wu), hidden = gate act(z), dx = LN'(dz Wd) [+ dY], dgate (M,).

    scaling includes the dropout's 1 / (1 - p). The sums over K of LN' come from sums over the rank:
    sum_k (dz Wd)_k w_k = dz . hidden_sum and sum_k (dz Wd)_k w_k xhat_k = dz . (z - hidden_bias).
    The rank lies in RANKS tiles of BLOCK_R: of z, hidden and its slope a program holds one at a time, of dz all.
    """
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK)
    m_in = (m < M)[:, None]
    row = m.to(tl.int64)[:, None]
    dy_ptr += row * stride_ym
    zero = tl.zeros([BLOCK_M], tl.float32)
    dgate, c1, c2 = zero, zero, zero
    dh = ()
    for _ in tl.static_range(RANKS):
        dh += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)  # type: ignore[assignment]
    for n0 in range(0, N, BLOCK):
        n = n0 + c
        n_in = n < N
        dy = tl.load(dy_ptr + n[None, :], mask=m_in & n_in[None, :], other=0.0)
        if DROPOUT:
            dy = tl.where(dropout_keep(seed_ptr, threshold, m0, n0, BLOCK_M, BLOCK), dy, 0.0).to(dy.dtype)
        if channel_ptr is not None:
            dy = dy.to(tl.float32) * tl.load(channel_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
        if (dgate_ptr is not None) & (up_bias_ptr is not None):
            bias = tl.load(up_bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)
            dgate += tl.sum(dy.to(tl.float32) * bias[None, :], 1)
        if UP_PIECES == 1:
            dy = dy.to(up_ptr.dtype.element_ty)
        sums = ()
        for i in tl.static_range(RANKS):
            w = tl.load(up_ptr + n.to(tl.int64)[:, None] * stride_un + (i * BLOCK_R + r)[None, :],
                        mask=n_in[:, None] & (i * BLOCK_R + r < rank)[None, :], other=0.0)  # fmt: skip
            sums += (dot_wide(dy, w, dh[i], UP_PIECES),)  # type: ignore[assignment]
        dh = sums

    dzs = ()
    for i in tl.static_range(RANKS):
        ri = i * BLOCK_R + r
        of_rank = row * rank + ri[None, :]
        in_rank = m_in & (ri < rank)[None, :]
        z = tl.load(z_ptr + of_rank, mask=in_rank, other=0.0).to(tl.float32)
        value, slope = activate(z, ACTIVATION)
        dgate += tl.sum(value * dh[i], 1)
        dz = dh[i] * slope * scaling
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + m, mask=m < M, other=0.0).to(tl.float32)
            dz *= gate[:, None]
            value *= gate[:, None]
        if dz_ptr is not None:
            tl.store(dz_ptr + of_rank, dz, mask=in_rank)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + of_rank, value, mask=in_rank)
        if ln_weight_ptr is not None:
            hidden_sum = tl.load(hidden_sum_ptr + ri, mask=ri < rank, other=0.0)
            hidden_bias = tl.load(hidden_bias_ptr + ri, mask=ri < rank, other=0.0)
            c1 += tl.sum(dz * hidden_sum[None, :], 1) / K
            c2 += tl.sum(dz * (z - hidden_bias[None, :]), 1) / K
        dzs += (dz.to(down_ptr.dtype.element_ty) if DOWN_PIECES == 1 else dz,)  # type: ignore[assignment]
    if dgate_ptr is not None:
        tl.store(dgate_ptr + m, dgate * scaling, mask=m < M)

    if dx_ptr is not None:
        if ln_weight_ptr is not None:
            mean = tl.load(stats_ptr + m, mask=m < M, other=0.0)
            inverse_std = tl.load(stats_ptr + M + m, mask=m < M, other=0.0)
        for k0 in range(0, K, BLOCK):
            k = k0 + c
            k_in = k < K
            inside = m_in & k_in[None, :]
            dx = tl.zeros([BLOCK_M, BLOCK], tl.float32)
            for i in tl.static_range(RANKS):
                ri = i * BLOCK_R + r
                w = tl.load(down_ptr + ri[:, None] * stride_dr + k[None, :],
                            mask=(ri < rank)[:, None] & k_in[None, :], other=0.0)  # fmt: skip
                dx = dot_wide(dzs[i], w, dx, DOWN_PIECES)
            if ln_weight_ptr is not None:
                x = tl.load(x_ptr + row * stride_xm + k[None, :], mask=inside, other=0.0).to(tl.float32)
                xhat = (x - mean[:, None]) * inverse_std[:, None]
                dx *= tl.load(ln_weight_ptr + k, mask=k_in, other=0.0).to(tl.float32)[None, :]
                dx = (dx - c1[:, None] - xhat * c2[:, None]) * inverse_std[:, None]
            if ADD_X:
                dx += tl.load(dy_ptr + k[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


def column_products(
    v: torch.Tensor,
    t: torch.Tensor,
    dtype: torch.dtype,
    stats: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """t^T f(v) (r, C) and the gate-weighted column sums of f(v) (C,), float32; f: (v - mean) / std, then dropout.

    v: (M, C), t: (M, r) float32, dtype: that of the weight, in which the product is rounded.
    """
    (m, columns), rank, on = v.shape, t.shape[1], target(v.device)
    pieces = 1 if dtype.itemsize == 2 else 3 if v.dtype == torch.bfloat16 and stats is None else 6
    block_m, block_c = (64, 128) if pieces == 1 else (32, 64)
    tile_r = block_r(rank) if pieces == 1 else 16
    grid = (triton.cdiv(columns, block_c), triton.cdiv(rank, tile_r))
    steps = triton.cdiv(m, block_m)
    most = max(1, v.numel() * v.element_size() // (32 * columns * rank))  # planes of at most an eighth of v's bytes
    m_per_split = triton.cdiv(steps, split_count(grid[0] * grid[1], steps, most, on)) * block_m
    splits = triton.cdiv(m, m_per_split)
    planes = torch.empty((splits, rank, columns), dtype=torch.float32, device=v.device)
    sums = torch.empty((splits, columns), dtype=torch.float32, device=v.device)
    dropout = dropout_arguments(p, seed)
    scale = dropout.pop("inverse_keep")
    launch(
        _bottleneck_columns_kernel,
        (*grid, splits),
        v.device,
        v_ptr=v,
        t_ptr=t,
        stats_ptr=stats,
        gate_ptr=gate,
        out_ptr=planes,
        sums_ptr=sums,
        M=m,
        C=columns,
        rank=rank,
        m_per_split=m_per_split,
        stride_vm=v.stride(0),
        **dropout,
        OPERAND={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype],
        PIECES=pieces,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_R=tile_r,
        num_warps=8 if pieces == 1 else 4,
        num_stages=2 if on.kind == "hip" else 3,
    )
    return sum_planes(planes, torch.empty_like(planes[0]), scale), sum_planes(sums, torch.empty_like(sums[0]), scale)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_columns_kernel(
    v_ptr, t_ptr, stats_ptr, gate_ptr, out_ptr, sums_ptr, seed_ptr, M, C, rank, m_per_split, threshold, stride_vm,
    DROPOUT: tl.constexpr, OPERAND: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] (rank, C) = t^T f(v) and sums[split] (C,) over the split's part of the rows."""
    c0 = tl.program_id(0) * BLOCK_C
    split = tl.program_id(2)
    c = c0 + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_C], tl.float32)
    for m0 in range(split * m_per_split, tl.minimum(M, (split + 1) * m_per_split), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)[:, None]
        m_in = (m < M)[:, None]
        v = tl.load(v_ptr + row * stride_vm + c[None, :], mask=m_in & (c < C)[None, :], other=0.0)
        t = tl.load(t_ptr + row * rank + r[None, :], mask=m_in & (r < rank)[None, :], other=0.0)
        if stats_ptr is not None:
            mean = tl.load(stats_ptr + m, mask=m < M, other=0.0)
            inverse_std = tl.load(stats_ptr + M + m, mask=m < M, other=0.0)
            v = (v.to(tl.float32) - mean[:, None]) * inverse_std[:, None]
        if DROPOUT:
            v = tl.where(dropout_keep(seed_ptr, threshold, m0, c0, BLOCK_M, BLOCK_C), v, 0.0).to(v.dtype)
        weighted = v.to(tl.float32)
        if gate_ptr is not None:
            weighted *= tl.load(gate_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        sums += tl.sum(weighted, 0)
        if PIECES == 1:
            v = v.to(OPERAND)
        acc = dot_wide(tl.trans(v), t, acc, PIECES)
    out_ptr += (split.to(tl.int64) * rank + r)[None, :] * C + c[:, None]
    tl.store(out_ptr, acc, mask=(c < C)[:, None] & (r < rank)[None, :])
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + split.to(tl.int64) * C + c, sums, mask=c < C)
