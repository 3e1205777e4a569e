"""The adapter's own products: skinny GEMMs that read x or dY once, each a split reduction into float32 planes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_common.device import dot_wide, dropout_keep
from ...triton_common.launch import cdiv, launch, power_of_two, target
from ...triton_common.lowrank import block_r, dropout_arguments
from ...triton_common.planes import split_count, sum_planes
from .triton_tiles import da_tile, dy_tile, options, pieces, shrink_tile, stages


def shrink(x: torch.Tensor, lora_A: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """S (M, r) float32 = drop(x) A^T."""
    m, k = x.shape
    rank, on = lora_A.shape[0], target(x.device)
    tile = shrink_tile(pieces(x, lora_A), m, on)
    block_m, block_k = max(16, min(tile.block_m, power_of_two(m))), tile.block
    tile_r = min(block_r(rank), tile.block_r, 32 if p else tile.block_r)  # a mask beside 64 columns spills on sm_80
    grid = (cdiv(m, block_m), cdiv(rank, tile_r))
    steps = cdiv(k, block_k)
    k_per_split = cdiv(steps, split_count(grid[0] * grid[1], steps, 16, on)) * block_k
    splits = cdiv(k, k_per_split)
    planes = torch.empty((splits, m, rank), dtype=torch.float32, device=x.device)
    dropout = dropout_arguments(p, seed)
    launch(
        _lora_shrink_kernel,
        (*grid, splits),
        x.device,
        x_ptr=x,
        a_ptr=lora_A,
        out_ptr=planes,
        M=m,
        K=k,
        rank=rank,
        k_per_split=k_per_split,
        stride_xm=x.stride(0),
        stride_ar=lora_A.stride(0),
        stride_ak=lora_A.stride(1),
        **dropout,
        PIECES=pieces(x, lora_A),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=tile_r,
        **options(pieces(x, lora_A), tile_r, on),
    )
    return planes[0] if splits == 1 else sum_planes(planes, torch.empty_like(planes[0]))


def t_and_db(
    dy: torch.Tensor, lora_B: torch.Tensor, s: torch.Tensor, scaling: float, need_t: bool, need_db: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """T (M, r) float32 = scaling dY B and dB (N, r) = scaling dY^T S, in one pass over dY."""
    m, n = dy.shape
    rank, on = lora_B.shape[1], target(dy.device)
    tile = dy_tile(pieces(dy, lora_B), rank, on)
    tile_r = min(block_r(rank), tile.block_r)
    grid = (cdiv(n, tile.block), cdiv(rank, tile_r))
    steps = cdiv(m, tile.block_m)
    # dB's planes stay at an eighth of dY's bytes
    most = max(1, dy.numel() * dy.element_size() // (32 * n * rank)) if need_db else steps
    m_per_split = cdiv(steps, split_count(grid[0] * grid[1], steps, most, on)) * tile.block_m
    splits = cdiv(m, m_per_split)
    t = torch.empty((grid[0], m, rank), dtype=torch.float32, device=dy.device) if need_t else None
    db = torch.empty((splits, n, rank), dtype=torch.float32, device=dy.device) if need_db else None
    launch(
        _lora_dy_kernel,
        (*grid, splits),
        dy.device,
        dy_ptr=dy,
        b_ptr=lora_B,
        s_ptr=s if need_db else None,
        t_ptr=t,
        db_ptr=db,
        M=m,
        N=n,
        rank=rank,
        m_per_split=m_per_split,
        stride_ym=dy.stride(0),
        stride_bn=lora_B.stride(0),
        stride_br=lora_B.stride(1),
        stride_sm=s.stride(0),
        HAS_T=need_t,
        HAS_DB=need_db,
        PIECES=pieces(dy, lora_B),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block,
        BLOCK_R=tile_r,
        num_warps=tile.num_warps,
        num_stages=2 if tile.block_m * tile.block > 8192 or tile.num_warps == 8 else stages(on),
    )
    return (
        None if t is None else sum_planes(t, torch.empty_like(t[0]), scaling),
        None
        if db is None
        else sum_planes(db, torch.empty(lora_B.shape, dtype=lora_B.dtype, device=dy.device), scaling),
    )


def da(x: torch.Tensor, t: torch.Tensor, lora_A: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dA (r, K) = T^T drop(x), the mask made again from its seed."""
    m, k = x.shape
    rank, on = lora_A.shape[0], target(x.device)
    tile = da_tile(pieces(x, lora_A), on)
    tile_r = min(block_r(rank), tile.block_r)
    grid = (cdiv(k, tile.block), cdiv(rank, tile_r))
    steps = cdiv(m, tile.block_m)
    most = max(1, x.numel() * x.element_size() // (32 * k * rank))  # planes of at most an eighth of x's bytes
    m_per_split = cdiv(steps, split_count(grid[0] * grid[1], steps, most, on)) * tile.block_m
    splits = cdiv(m, m_per_split)
    planes = torch.empty((splits, rank, k), dtype=torch.float32, device=x.device)
    dropout = dropout_arguments(p, seed)
    scale = dropout.pop("inverse_keep")
    launch(
        _lora_da_kernel,
        (*grid, splits),
        x.device,
        x_ptr=x,
        t_ptr=t,
        out_ptr=planes,
        M=m,
        K=k,
        rank=rank,
        m_per_split=m_per_split,
        stride_xm=x.stride(0),
        stride_tm=t.stride(0),
        **dropout,
        PIECES=pieces(x, lora_A),
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block,
        BLOCK_R=tile_r,
        **options(pieces(x, lora_A), tile_r, target(x.device)),
    )
    return sum_planes(planes, torch.empty((rank, k), dtype=lora_A.dtype, device=x.device), scale)


@triton.jit(do_not_specialize=["threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, M, K, rank, k_per_split, threshold, inverse_keep,
    stride_xm, stride_ar, stride_ak,
    DROPOUT: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] (M, rank) = drop(x) A^T over the split's part of K."""
    m0 = tl.program_id(0) * BLOCK_M
    split = tl.program_id(2)
    m = m0 + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x_ptr += m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    a_ptr += r[None, :] * stride_ar + k[:, None] * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(split * k_per_split, tl.minimum(K, (split + 1) * k_per_split), BLOCK_K):
        k_in = k < K - k0
        x = tl.load(x_ptr + k0, mask=(m < M)[:, None] & k_in[None, :], other=0.0)
        a = tl.load(a_ptr + k0 * stride_ak, mask=k_in[:, None] & (r < rank)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(dropout_keep(seed_ptr, threshold, m0, k0, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot_wide(x, a, acc, PIECES)
    if DROPOUT:
        acc *= inverse_keep
    out_ptr += (split.to(tl.int64) * M + m)[:, None] * rank + r[None, :]
    tl.store(out_ptr, acc, mask=(m < M)[:, None] & (r < rank)[None, :])


@triton.jit
def _lora_dy_kernel(
    dy_ptr, b_ptr, s_ptr, t_ptr, db_ptr, M, N, rank, m_per_split, stride_ym, stride_bn, stride_br, stride_sm,
    HAS_T: tl.constexpr, HAS_DB: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t[tile of N] (M, rank) = dY B over the tile; db[split] (N, rank) = dY^T S over the split's part of M."""
    tile, split = tl.program_id(0), tl.program_id(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    r_in = (r < rank)[None, :]
    dy_ptr += n[None, :]
    if HAS_T:
        b = tl.load(b_ptr + n.to(tl.int64)[:, None] * stride_bn + r[None, :] * stride_br,
                    mask=(n < N)[:, None] & r_in, other=0.0)  # fmt: skip
        t_ptr += tile.to(tl.int64) * M * rank + r[None, :]
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for m0 in range(split * m_per_split, tl.minimum(M, (split + 1) * m_per_split), BLOCK_M):
        row = (m0 + m).to(tl.int64)[:, None]
        m_in = (m < M - m0)[:, None]
        dy = tl.load(dy_ptr + row * stride_ym, mask=m_in & (n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if HAS_T:
            t = dot_wide(dy, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PIECES)
            tl.store(t_ptr + row * rank, t, mask=m_in & r_in)
        if HAS_DB:
            s = tl.load(s_ptr + row * stride_sm + r[None, :], mask=m_in & r_in, other=0.0)
            db = dot_wide(tl.trans(dy), s, db, PIECES)
    if HAS_DB:
        db_ptr += (split.to(tl.int64) * N + n)[:, None] * rank + r[None, :]
        tl.store(db_ptr, db, mask=(n < N)[:, None] & r_in)


@triton.jit(do_not_specialize=["threshold"])
def _lora_da_kernel(
    x_ptr, t_ptr, out_ptr, seed_ptr, M, K, rank, m_per_split, threshold, stride_xm, stride_tm,
    DROPOUT: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] (rank, K) = T^T (mask * x) over the split's part of M."""
    k0 = tl.program_id(0) * BLOCK_K
    split = tl.program_id(2)
    k = k0 + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for m0 in range(split * m_per_split, tl.minimum(M, (split + 1) * m_per_split), BLOCK_M):
        row = (m0 + m).to(tl.int64)[:, None]
        m_in = (m < M - m0)[:, None]
        x = tl.load(x_ptr + row * stride_xm + k[None, :], mask=m_in & (k < K)[None, :], other=0.0)
        t = tl.load(t_ptr + row * stride_tm + r[None, :], mask=m_in & (r < rank)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(dropout_keep(seed_ptr, threshold, m0, k0, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot_wide(tl.trans(x), t, acc, PIECES)
    out_ptr += (split.to(tl.int64) * rank + r)[None, :] * K + k[:, None]
    tl.store(out_ptr, acc, mask=(k < K)[:, None] & (r < rank)[None, :])
