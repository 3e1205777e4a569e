"""The fused forward kernel: a program takes its rows down, through the activation and up again."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.activation import activate
from ...triton_common.device import apply_dropout, dot_wide


@triton.jit
def _join_tile(x, k_in, k0, K, eps, base, mean, squares, scale, BLOCK: tl.constexpr):
    """(x - mean) * scale of a tile's rows, and base, mean, squares, scale with the tile joined (Chan et al., 1979).

    base + mean is the mean of a row so far, and its sum of squares is around that. base is the first tile's mean:
    joining then rounds at the scale of what varies, however far from zero a row lies. That x is taken around the mean
    so far rather than the whole row's is made good by the caller; by Hardy's inequality it costs a rounded operand at
    most a factor of sqrt(5) in the root mean square, where the first tile's mean alone could cost sqrt(K / BLOCK).
    scale is 1 / std so far, rounded down to a power of two, whose products are exact: it keeps operands near 1.
    """
    count = tl.minimum(K - k0, BLOCK).to(tl.float32)
    share = count / (k0 + count)
    x = tl.where(k_in, x - base[:, None] - mean[:, None], 0.0)
    delta = tl.sum(x, 1) / count
    step = delta * share
    d = tl.where(k_in, x - delta[:, None], 0.0)
    squares += tl.sum(d * d, 1) + delta * step * k0
    base = tl.where(k0 == 0, delta, base)
    mean = tl.where(k0 == 0, 0.0, mean + step)
    inverse_std = 1.0 / tl.sqrt(squares / (k0 + count) + eps)
    scale = (inverse_std.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.minimum(scale, 2.0**100)  # finite where a tile of equal values meets no eps
    return (x - step[:, None]) * scale[:, None], step, base, mean, squares, scale


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
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if ln_weight_ptr is not None:  # z = sum_k (x - mean) scale gamma Wd, kept true for the mean and scale so far
        base, mean = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        squares, scale = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], 1.0, tl.float32)
        weight_sum, bias_sum = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    down_ptr += r[None, :] * stride_dr + c[:, None]
    for k0 in range(0, K, BLOCK):
        k_in = c < K - k0
        x = tl.load(x_ptr + (k0 + c)[None, :], mask=m_in & k_in[None, :], other=0.0)
        w = tl.load(down_ptr + k0, mask=k_in[:, None] & r_in[None, :], other=0.0)
        if ln_weight_ptr is not None:
            gamma = tl.load(ln_weight_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)
            before = scale
            x, step, base, mean, squares, scale = _join_tile(
                x.to(tl.float32), k_in[None, :], k0, K, eps, base, mean, squares, scale, BLOCK
            )
            x *= gamma[None, :]
            z = z * (scale / before)[:, None] - (step * scale)[:, None] * weight_sum[None, :]
            weight_sum += tl.sum(w.to(tl.float32) * gamma[:, None], 0)
            if ln_bias_ptr is not None:
                beta = tl.load(ln_bias_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)
                bias_sum += tl.sum(w.to(tl.float32) * beta[:, None], 0)
        if DOWN_PIECES == 1:
            x = x.to(w.dtype)
        z = dot_wide(x, w, z, DOWN_PIECES)
    if ln_weight_ptr is not None:
        inverse_std = 1.0 / tl.sqrt(squares / K + eps)
        z = z * (inverse_std / scale)[:, None] + bias_sum[None, :]
        if stats_ptr is not None:
            tl.store(stats_ptr + m, base + mean, mask=m < M)
            tl.store(stats_ptr + M + m, inverse_std, mask=m < M)
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
    last = (tl.cdiv(N, BLOCK) - 1) * BLOCK
    for back in range(0, N, BLOCK):  # from the end: where x is the residual, that part of it is still in the L2 cache
        n0 = last - back
        n = n0 + c
        n_in = n < N
        inside = m_in & n_in[None, :]
        w = tl.load(up_ptr + n.to(tl.int64)[None, :] * stride_un + r[:, None], mask=r_in[:, None] & n_in[None, :],
                    other=0.0)  # fmt: skip
        if residual_ptr is not None:  # on its way during the product
            added = tl.load(residual_ptr + row * stride_am + n[None, :], mask=inside, other=0.0)
        u = dot_wide(hidden, w, tl.zeros([BLOCK_M, BLOCK], tl.float32), UP_PIECES)
        if up_bias_ptr is not None:
            u += tl.load(up_bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
        if channel_ptr is not None:
            u *= tl.load(channel_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
        u *= factor[:, None]
        if DROPOUT:
            u = apply_dropout(u, seed_ptr, threshold, inverse_keep, m0, n0, BLOCK_M, BLOCK)
        if residual_ptr is not None:
            u += added.to(tl.float32)
        # y must not drive x out of the cache
        tl.store(y_ptr + row * N + n[None, :], u.to(y_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")
