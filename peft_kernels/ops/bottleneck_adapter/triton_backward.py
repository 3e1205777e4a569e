"""The backward kernel over rows: dZ, dX and the gate's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.activation import activate
from ...triton_common.device import dot_wide, dropout_keep


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_bwd_kernel(
    dy_ptr, x_ptr, z_ptr, stats_ptr, down_ptr, up_ptr, up_bias_ptr, ln_weight_ptr, norm_sums_ptr,
    channel_ptr, gate_ptr, dx_ptr, dz_ptr, hidden_ptr, dgate_ptr, seed_ptr, M, K, N, rank, scaling, threshold,
    stride_ym, stride_xm, stride_dr, stride_un,
    ADD_X: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    DOWN_PIECES: tl.constexpr, UP_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, RANKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dz (M, rank) = s act'(z) ((mask * dY) Wu), hidden = gate act(z), dx = LN'(dz Wd) [+ dY], dgate (M,).

    scaling includes the dropout's 1 / (1 - p). The sums over K of LN' come from sums over the rank:
    sum_k (dz Wd)_k w_k = dz . sum_k w_k Wd_k and sum_k (dz Wd)_k w_k xhat_k = dz . (z - z at xhat = 0).
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
            tl.store(hidden_ptr + of_rank, value.to(hidden_ptr.dtype.element_ty), mask=in_rank)
        if ln_weight_ptr is not None:
            hidden_sum = tl.load(norm_sums_ptr + rank + ri, mask=ri < rank, other=0.0)
            hidden_bias = tl.load(norm_sums_ptr + 2 * rank + ri, mask=ri < rank, other=0.0)
            c1 += tl.sum(dz * hidden_sum[None, :], 1) / K
            c2 += tl.sum(dz * (z - hidden_bias[None, :]), 1) / K
        dzs += (dz.to(down_ptr.dtype.element_ty) if DOWN_PIECES == 1 else dz,)  # type: ignore[assignment]
    if dgate_ptr is not None:
        tl.store(dgate_ptr + m, dgate * scaling, mask=m < M)

    if dx_ptr is not None:
        if ln_weight_ptr is not None:
            mean = tl.load(stats_ptr + m, mask=m < M, other=0.0)
            inverse_std = tl.load(stats_ptr + M + m, mask=m < M, other=0.0)
        last = (tl.cdiv(K, BLOCK) - 1) * BLOCK
        # From the end: where dY is x's gradient too, that part of it is still in the L2 cache. num_stages here has x
        # and dY fetched ahead too, which otherwise only the operands of a product are.
        for back in tl.range(0, K, BLOCK, num_stages=STAGES):
            k = last - back + c
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
            tl.store(dx_ptr + row * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")
