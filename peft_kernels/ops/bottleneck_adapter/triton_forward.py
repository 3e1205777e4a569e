"""The fused forward kernel: a program takes its rows down, through the activation and up again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_common.activation import activate
from ...triton_common.device import apply_dropout, dot, dot_wide
from ...triton_common.launch import launch, power_of_two

# How layer norm enters the product with Wd: not at all; in Wd, with x as it is; in x.
NO_NORM, FOLDED, NORMED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def fold_norm(
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    fold: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """W = round(ln_weight Wd / unit) (r, K) if fold, and float32 (3, r): unit, W's sums over K, Wd ln_bias + bd.

    unit is a power of two for each row, so that float16 holds W; without fold it is one, and the sums are not rounded.
    """
    rank, k = down.shape
    folded = torch.empty((rank, k), dtype=down.dtype, device=down.device) if fold else None
    vectors = torch.empty((3, rank), dtype=torch.float32, device=down.device)
    launch(
        _fold_norm_kernel,
        (rank,),
        down.device,
        down_ptr=down,
        down_bias_ptr=down_bias,
        ln_weight_ptr=ln_weight,
        ln_bias_ptr=ln_bias,
        folded_ptr=folded,
        vectors_ptr=vectors,
        K=k,
        rank=rank,
        stride_dr=down.stride(0),
        BLOCK=min(4096, power_of_two(k)),
        num_warps=8,
    )
    return folded, vectors


@triton.jit
def _fold_norm_kernel(
    down_ptr, down_bias_ptr, ln_weight_ptr, ln_bias_ptr, folded_ptr, vectors_ptr, K, rank, stride_dr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    down_ptr += r.to(tl.int64) * stride_dr
    c = tl.arange(0, BLOCK)
    unit = 1.0
    if folded_ptr is not None:
        largest = tl.zeros([BLOCK], tl.float32)
        for k0 in range(0, K, BLOCK):
            k = k0 + c
            w = tl.load(down_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            w *= tl.load(ln_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(w))
        unit = (tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.minimum(tl.maximum(unit, 2.0**-100), 2.0**100)
    sums, bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + c
        down = tl.load(down_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = down * tl.load(ln_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if folded_ptr is not None:
            rounded = (w * (1.0 / unit)).to(folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + r.to(tl.int64) * K + k, rounded, mask=k < K)
            w = rounded.to(tl.float32)
        sums += w
        if ln_bias_ptr is not None:
            bias += down * tl.load(ln_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    total = tl.sum(bias, 0)
    if down_bias_ptr is not None:
        total += tl.load(down_bias_ptr + r).to(tl.float32)
    tl.store(vectors_ptr + r, unit)
    tl.store(vectors_ptr + rank + r, tl.sum(sums, 0))
    tl.store(vectors_ptr + 2 * rank + r, total)


@triton.jit
def _add_to_sums(x, k_in, k0, base, sums, squares, EVEN: tl.constexpr):
    """base, and the sums of x - base and of its square, with a tile added: for each eight columns of a tile their own.

    A thread loads eight neighbouring columns, so that adding takes no other thread. base is the mean of their first
    eight: the sums then round at the scale of what varies, however far from zero a row lies.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    x = tl.reshape(x.to(tl.float32), [BLOCK_M, BLOCK // 8, 8])
    if EVEN:
        total, inside = tl.sum(x, 2), 8.0
    else:
        keep = tl.reshape(tl.broadcast_to(k_in[None, :], [BLOCK_M, BLOCK]), [BLOCK_M, BLOCK // 8, 8])
        total, inside = tl.sum(x, 2), tl.sum(keep.to(tl.float32), 2)
    base = tl.where(k0 == 0, total / tl.maximum(inside, 1.0), base)
    x -= base[:, :, None]
    if not EVEN:
        x = tl.where(keep, x, 0.0)
    return base, sums + tl.sum(x, 2), squares + tl.sum(x * x, 2)


@triton.jit
def _statistics(base, sums, squares, K, eps):
    """(a, b, 1 / std) of the rows, a + b their mean: float32 need not hold it to the scale of what varies."""
    BLOCK: tl.constexpr = base.shape[1] * 8
    left = K % BLOCK - tl.arange(0, BLOCK // 8) * 8
    count = (K // BLOCK * 8 + tl.minimum(tl.maximum(left, 0), 8)).to(tl.float32)[None, :]
    near = tl.sum(base * count, 1) / K
    own = sums / tl.maximum(count, 1.0)
    distance = base - near[:, None] + own
    rest = tl.sum(distance * count, 1) / K
    distance -= rest[:, None]
    squares = tl.sum(squares - sums * own + distance * distance * count, 1)
    return near, rest, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_fwd_kernel(
    x_ptr, residual_ptr, down_ptr, down_bias_ptr, folded_ptr, up_ptr, up_bias_ptr, ln_weight_ptr, ln_bias_ptr,
    channel_ptr, gate_ptr, y_ptr, z_ptr, stats_ptr, seed_ptr, M, K, N, rank, scaling, eps, threshold, inverse_keep,
    stride_xm, stride_am, stride_dr, stride_un,
    NORM: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, DOWN_PIECES: tl.constexpr, UP_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = residual + mask * s (act(LN(x) Wd^T + bd) Wu^T + bu); z before act; stats (2, M).

    FOLDED: down is W of `fold_norm`, and Wd LN(x) = unit (W x - mean sum W) / std + Wd ln_bias: x goes to the tensor
    cores as it is, W's rounding only meets x - mean, and a row's mean and 1 / std may come with its last column.
    With products cut off as tensor cores do, z of rows a thousand std from zero errs no more than eager's.
    NORMED: a first loop takes the statistics. EVEN: K is a multiple of BLOCK.
    """
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK)
    m_in, r_in = (m < M)[:, None], r < rank
    row = m.to(tl.int64)[:, None]
    x_ptr += row * stride_xm
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if NORM != NO_NORM:
        base = tl.zeros([BLOCK_M, BLOCK // 8], tl.float32)
        sums, squares = base, base
    if NORM == FOLDED:
        unit = tl.load(folded_ptr + r, mask=r_in, other=0.0)[None, :]
    if NORM == NORMED:
        for k0 in range(0, K, BLOCK):
            k_in = c < K - k0
            x = tl.load(x_ptr + (k0 + c)[None, :], mask=m_in & k_in[None, :], other=0.0)
            base, sums, squares = _add_to_sums(x, k_in, k0, base, sums, squares, EVEN)
        near, rest, inverse_std = _statistics(base, sums, squares, K, eps)
    down_ptr += r[None, :] * stride_dr + c[:, None]
    for k0 in range(0, K, BLOCK):
        k_in = c < K - k0
        x = tl.load(x_ptr + (k0 + c)[None, :], mask=m_in & k_in[None, :], other=0.0)
        w = tl.load(down_ptr + k0, mask=k_in[:, None] & r_in[None, :], other=0.0)
        if NORM == FOLDED:
            base, sums, squares = _add_to_sums(x, k_in, k0, base, sums, squares, EVEN)
            # a tile is summed apart: a long sum of a row far from zero would lose too much in the tensor cores
            z = tl.fma(dot(x, w, tl.zeros_like(z)), tl.broadcast_to(unit, [BLOCK_M, BLOCK_R]), z)
        else:
            if NORM == NORMED:
                x = (x.to(tl.float32) - near[:, None] - rest[:, None]) * inverse_std[:, None]
                x *= tl.load(ln_weight_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)[None, :]
                if ln_bias_ptr is not None:
                    x += tl.load(ln_bias_ptr + k0 + c, mask=k_in, other=0.0).to(tl.float32)[None, :]
            if DOWN_PIECES == 1:
                x = x.to(w.dtype)
            z = dot_wide(x, w, z, DOWN_PIECES)
    if NORM == FOLDED:
        near, rest, inverse_std = _statistics(base, sums, squares, K, eps)
        of_mean = tl.load(folded_ptr + rank + r, mask=r_in, other=0.0)[None, :] * unit
        z = (z - near[:, None] * of_mean - rest[:, None] * of_mean) * inverse_std[:, None]
        z += tl.load(folded_ptr + 2 * rank + r, mask=r_in, other=0.0)[None, :]
    elif down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + r, mask=r_in, other=0.0).to(tl.float32)[None, :]
    if stats_ptr is not None:
        tl.store(stats_ptr + m, near + rest, mask=m < M)
        tl.store(stats_ptr + M + m, inverse_std, mask=m < M)
    if z_ptr is not None:
        tl.store(z_ptr + row * rank + r[None, :], z.to(z_ptr.dtype.element_ty), mask=m_in & r_in[None, :])
    hidden, _ = activate(z, ACTIVATION)
    if UP_PIECES == 1:
        hidden = hidden.to(up_ptr.dtype.element_ty)

    factor = tl.zeros([BLOCK_M], tl.float32) + scaling
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + m, mask=m < M, other=0.0).to(tl.float32)
    last = (tl.cdiv(N, BLOCK) - 1) * BLOCK
    # From the end: where x is the residual, that part of it is still in the L2 cache. num_stages here has the residual
    # fetched ahead too, which otherwise only the operands of a product are.
    for back in tl.range(0, N, BLOCK, num_stages=STAGES):
        n0 = last - back
        n = n0 + c
        n_in = n < N
        inside = m_in & n_in[None, :]
        w = tl.load(up_ptr + n.to(tl.int64)[None, :] * stride_un + r[:, None], mask=r_in[:, None] & n_in[None, :],
                    other=0.0)  # fmt: skip
        if residual_ptr is not None:
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
