"""The weight gradients, first half: sums over parts of the rows; `triton_finish` adds the parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...dropout import scale_mask
from ...triton_common.device import dot_wide, dropout_keep
from ...triton_common.launch import Target, cdiv, launch, target
from ...triton_common.lowrank import block_r, dropout_arguments
from ...triton_common.planes import part_sums, rows_at_once, split_count


class Products(NamedTuple):
    """Parts by rows, float32: f(v)^T t (splits, C, r), and where wanted sums of f(v) (splits, C), of t (splits, r)."""

    planes: torch.Tensor
    sums: torch.Tensor | None
    t_sums: torch.Tensor | None


def column_products(
    v: torch.Tensor,
    t: torch.Tensor,
    dtype: torch.dtype,
    stats: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    sums: bool = True,
    by_column: bool = True,
) -> Products:
    """t^T f(v) and, if sums, the gate-weighted column sums of f(v), f: (v - mean) / std, then dropout.

    v: (M, C), t: (M, r), dtype: that of the weight, in which the product is rounded. by_column: the products of a
    column lie together, as those of Wu do; else those of a row, as Wd's, and t is summed too.
    """
    (m, columns), rank, on = v.shape, t.shape[1], target(v.device)
    pieces = 1 if dtype.itemsize == 2 else 3 if v.dtype == torch.bfloat16 and stats is None else 6
    if pieces == 6 and rank > 64:
        return _float32_products(v, t, stats, gate, p, seed, by_column)
    tile = _tile(pieces, rank, stats is not None, on)
    grid = (cdiv(columns, tile["BLOCK_C"]), cdiv(rank, tile["BLOCK_R"]))
    steps = cdiv(m, tile["BLOCK_M"])
    most = max(1, v.numel() * v.element_size() // (32 * columns * rank))  # planes of at most an eighth of v's bytes
    m_per_split = cdiv(steps, split_count(grid[0] * grid[1], steps, most, on)) * tile["BLOCK_M"]
    splits = cdiv(m, m_per_split)
    shape = (splits, columns, rank) if by_column else (splits, rank, columns)
    planes = torch.empty(shape, dtype=torch.float32, device=v.device)
    column_sums = torch.empty((splits, columns), dtype=torch.float32, device=v.device) if sums else None
    t_sums = None if by_column else torch.empty((splits, rank), dtype=torch.float32, device=v.device)
    planes = planes if by_column else planes.mT
    launch(
        _bottleneck_columns_kernel,
        (*grid, splits),
        v.device,
        v_ptr=v,
        t_ptr=t,
        stats_ptr=stats,
        gate_ptr=gate,
        out_ptr=planes,
        sums_ptr=column_sums,
        t_sums_ptr=t_sums,
        M=m,
        C=columns,
        rank=rank,
        m_per_split=m_per_split,
        stride_vm=v.stride(0),
        stride_oc=planes.stride(1),
        stride_or=planes.stride(2),
        **dropout_arguments(p, seed),
        # t / std may leave float16's range
        FOLDED=stats is not None and v.dtype == dtype == torch.bfloat16,
        OPERAND={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype],
        PIECES=pieces,
        ROWS=rows_at_once(tile["BLOCK_M"], tile["BLOCK_C"], v.element_size(), tile["num_warps"]),
        T_ROWS=rows_at_once(tile["BLOCK_M"], tile["BLOCK_R"], t.element_size(), tile["num_warps"]),
        STAGES=tile["num_stages"],
        **tile,
    )
    return Products(planes, column_sums, t_sums)


def _float32_products(
    v: torch.Tensor,
    t: torch.Tensor,
    stats: torch.Tensor | None,
    gate: torch.Tensor | None,
    p: float,
    seed: torch.Tensor | None,
    by_column: bool,
) -> Products:
    """`column_products` by the vendor's GEMM: what tensor cores cut off would add up over so many float32 products."""
    f = v.float()
    if stats is not None:
        f = (f - stats[0, :, None]) * stats[1, :, None]
    if p > 0:
        assert seed is not None
        f = f * scale_mask(seed[0], f.shape[0], f.shape[1], p).to(f.dtype)
    weighted = f if gate is None else f * gate.float()[:, None]
    t_sums = None if by_column else t.sum(0, dtype=torch.float64).float()[None]
    return Products((t.t() @ f)[None].mT, weighted.sum(0)[None], t_sums)


def _tile(pieces: int, rank: int, normed: bool, on: Target) -> dict[str, int]:
    """Set from compiled objects (no spills, shared memory) but for the four warps.

    H100, 8192 x 4096: 39 microseconds, and with layer norm 39 by four warps, 47 by eight; reading it takes 22.
    """
    block_m, block_c = (64, 128) if pieces == 1 else (32, 64)
    if on.arch == 100:  # more would spill
        block_m //= 2
    tile_r, warps = (block_r(rank), 4 if normed and on.arch == 90 else 8) if pieces == 1 else (16, 4)
    stages = 2 if on.kind == "hip" else 3
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_R": tile_r, "num_warps": warps, "num_stages": stages}


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_columns_kernel(
    v_ptr, t_ptr, stats_ptr, gate_ptr, out_ptr, sums_ptr, t_sums_ptr, seed_ptr, M, C, rank, m_per_split, threshold,
    inverse_keep, stride_vm, stride_oc, stride_or,
    DROPOUT: tl.constexpr, FOLDED: tl.constexpr, OPERAND: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, T_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out[split] (C, rank) = f(v)^T t, sums[split] (C,) and t_sums[split] (rank,) over the split's part of the rows.

    FOLDED: v goes to the tensor cores as it is, f(v)^T t = v^T (t / std) - sum of mean t / std, of the rounded t / std.
    """
    c0 = tl.program_id(0) * BLOCK_C
    split = tl.program_id(2).to(tl.int64)
    c = c0 + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    t_sums = tl.zeros([T_ROWS, BLOCK_R], tl.float32)
    of_mean = tl.zeros([T_ROWS, BLOCK_R], tl.float32)
    begin = tl.program_id(2) * m_per_split
    # num_stages here has the statistics fetched ahead too, which otherwise only the operands of a product are
    for m0 in tl.range(begin, tl.minimum(M, begin + m_per_split), BLOCK_M, num_stages=STAGES):
        m = m0 + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)[:, None]
        m_in = (m < M)[:, None]
        v = tl.load(v_ptr + row * stride_vm + c[None, :], mask=m_in & (c < C)[None, :], other=0.0)
        t = tl.load(t_ptr + row * rank + r[None, :], mask=m_in & (r < rank)[None, :], other=0.0)
        if t_sums_ptr is not None:
            t_sums += part_sums(t.to(tl.float32), T_ROWS)
        if stats_ptr is not None:
            mean = tl.load(stats_ptr + m, mask=m < M, other=0.0)
            inverse_std = tl.load(stats_ptr + M + m, mask=m < M, other=0.0)
            if FOLDED:
                t = (t.to(tl.float32) * inverse_std[:, None]).to(OPERAND)
                of_mean += part_sums(t.to(tl.float32) * mean[:, None], T_ROWS)
            else:
                v = (v.to(tl.float32) - mean[:, None]) * inverse_std[:, None]
        if DROPOUT:
            v = tl.where(dropout_keep(seed_ptr, threshold, m0, c0, BLOCK_M, BLOCK_C), v, 0.0).to(v.dtype)
        if sums_ptr is not None:
            weighted = v.to(tl.float32)
            if gate_ptr is not None:
                weighted *= tl.load(gate_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
            sums += part_sums(weighted, ROWS)
        if PIECES == 1:
            v = v.to(OPERAND)
        # a tile is summed apart: over many rows the tensor cores would lose more than float32's rounding does
        acc += dot_wide(tl.trans(v), t, tl.zeros_like(acc), PIECES) * inverse_keep
    if FOLDED:
        acc -= tl.sum(of_mean, 0)[None, :]
    out_ptr += split * C * rank + c[:, None] * stride_oc + r[None, :] * stride_or
    tl.store(out_ptr, acc, mask=(c < C)[:, None] & (r < rank)[None, :])
    if sums_ptr is not None:
        tl.store(sums_ptr + split * C + c, tl.sum(sums, 0) * inverse_keep, mask=(c < C) & (tl.program_id(1) == 0))
    if t_sums_ptr is not None:
        tl.store(t_sums_ptr + split * rank + r, tl.sum(t_sums, 0), mask=(r < rank) & (tl.program_id(0) == 0))
