"""The fused forward kernel: a program takes its rows down, through the activation and up again."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.activation import activate
from ...triton_common.device import apply_dropout, dot_wide


@triton.jit
def _row_statistics(x_ptr, m_in, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / std of the rows at x_ptr, one tile's joined to those of the tiles before (Chan et al., 1979).

    Around the first tile's mean: joining then rounds at the scale of what varies, however far from zero a row lies.
    """
    k = tl.arange(0, BLOCK_K)
    first = tl.load(x_ptr + k[None, :], mask=m_in & (k < K)[None, :], other=0.0).to(tl.float32)
    shift = tl.sum(first, 1) / tl.sum((k < K).to(tl.float32), 0)
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_in = (k < K - k0)[None, :]
        x = tl.load(x_ptr + (k0 + k)[None, :], mask=m_in & k_in, other=0.0).to(tl.float32)
        x = tl.where(k_in, x - shift[:, None], 0.0)
        count = tl.minimum(K - k0, BLOCK_K).to(tl.float32)
        share = count / (k0 + count)
        tile_mean = tl.sum(x, 1) / count
        d = tl.where(k_in, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        mean += delta * share
        squares += tl.sum(d * d, 1) + delta * delta * (k0 * share)
    return shift + mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_fwd_kernel(
    x_ptr, residual_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, ln_weight_ptr, ln_bias_ptr, channel_ptr,
    gate_ptr, y_ptr, z_ptr, stats_ptr, seed_ptr, M, K, N, rank, scaling, eps, threshold, inverse_keep,
    stride_xm, stride_am, stride_dr, stride_un,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DOWN_PIECES: tl.constexpr, UP_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = residual + mask * s (act(LN(x) Wd^T + bd) Wu^T + bu); z before act; stats (2, M)."""
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK)
    m_in, r_in = (m < M)[:, None], r < rank
    row = m.to(tl.int64)[:, None]
    x_ptr += row * stride_xm
    if ln_weight_ptr is not None:
        mean, inverse_std = _row_statistics(x_ptr, m_in, K, eps, BLOCK_M, BLOCK)
        if stats_ptr is not None:
            tl.store(stats_ptr + m, mean, mask=m < M)
            tl.store(stats_ptr + M + m, inverse_std, mask=m < M)

    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    down_ptr += r[None, :] * stride_dr + c[:, None]
    for k0 in range(0, K, BLOCK):
        k_in = c < K - k0
        x = tl.load(x_ptr + (k0 + c)[None, :], mask=m_in & k_in[None, :], other=0.0)
        w = tl.load(down_ptr + k0, mask=k_in[:, None] & r_in[None, :], other=0.0)
        if ln_weight_ptr is not None:
            weight = tl.load(ln_weight_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) - mean[:, None]) * inverse_std[:, None] * weight[None, :]
            if ln_bias_ptr is not None:
                x += tl.load(ln_bias_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)[None, :]
        if DOWN_PIECES == 1:
            x = x.to(w.dtype)
        z = dot_wide(x, w, z, DOWN_PIECES)
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + r, mask=r_in, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + row * rank + r[None, :], z.to(z_ptr.dtype.element_ty), mask=m_in & r_in[None, :])
    hidden, _ = activate(z, ACTIVATION)
    if UP_PIECES == 1:
        hidden = hidden.to(up_ptr.dtype.element_ty)

    factor = tl.zeros([BLOCK_M], tl.float32) + scaling
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + m, mask=m < M, other=0.0).to(tl.float32)
    for n0 in range(0, N, BLOCK):
        n = n0 + c
        n_in = n < N
        w = tl.load(up_ptr + n.to(tl.int64)[None, :] * stride_un + r[:, None], mask=r_in[:, None] & n_in[None, :],
                    other=0.0)  # fmt: skip
        u = dot_wide(hidden, w, tl.zeros([BLOCK_M, BLOCK], tl.float32), UP_PIECES)
        if up_bias_ptr is not None:
            u += tl.load(up_bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
        if channel_ptr is not None:
            u *= tl.load(channel_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
        u *= factor[:, None]
        if DROPOUT:
            u = apply_dropout(u, seed_ptr, threshold, inverse_keep, m0, n0, BLOCK_M, BLOCK)
        inside = m_in & n_in[None, :]
        if residual_ptr is not None:
            u += tl.load(residual_ptr + row * stride_am + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + n[None, :], u.to(y_ptr.dtype.element_ty), mask=inside)
