"""Decoding with an adapter, for a few rows: no pass over x or y of its own, two launches for everything.

The first launch's programs take tiles of the weight, each over a part of K, and one more program for each part takes
the adapter's A: what it reads is the same x. The second launch sums the parts, in a fixed order, and adds the
adapter's product and the bias to y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_common.device import dot_wide, low_rank_dot
from ...triton_common.launch import cdiv, launch, target
from ...triton_common.lowrank import LowRank, block_r
from ...weight4bit import Weight4bit
from .triton_kernels import k_width, split_of, tile_arguments, tile_for, weight_arguments, words
from .triton_words import columns_of_slots, words_loop

_MOST_ROWS, _MOST_RANK = 16, 64


def serves(x: torch.Tensor, weight: Weight4bit, rank: int) -> bool:
    """Whether `forward` takes the call."""
    return x.shape[0] <= _MOST_ROWS and 0 < rank <= _MOST_RANK and words(weight, target(x.device))


def forward(
    x: torch.Tensor,
    weight: Weight4bit,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    pieces: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) = x W^T + b + scaling S B^T and S (M, r) float32 = x A^T; pieces: see `dot_wide`, for x and A."""
    m, n, rank = x.shape[0], weight.shape[0], lora_A.shape[0]
    on = target(x.device)
    tile = tile_for(0, m, weight, on)
    tiles, k_per_split, splits = split_of(m, weight, tile, on)
    y_planes = x.new_empty((splits, m, n), dtype=torch.float32)
    s_planes = x.new_empty((splits, m, rank), dtype=torch.float32)
    launch(
        _lora_decode_kernel,
        (tiles + 1, 1, splits),
        x.device,
        x_ptr=x,
        a_ptr=lora_A,
        y_ptr=y_planes,
        s_ptr=s_planes,
        k_per_split=k_per_split,
        stride_xm=x.stride(0),
        stride_ar=lora_A.stride(0),
        stride_ak=lora_A.stride(1),
        rank=rank,
        **weight_arguments(weight, x.dtype, on),
        K_WIDTH=k_width(tile, weight, on),
        PIECES=pieces,
        BLOCK_R=block_r(rank),
        M=m,
        **tile_arguments(tile, weight, on),
    )
    y, s = x.new_empty((m, n)), torch.empty_like(s_planes[0])
    term = LowRank(s, lora_B.t(), scaling).arguments(x.dtype)
    names = ("right_ptr", "rank", "scaling", "stride_rr", "stride_rn", "LORA_PIECES")
    launch(
        _lora_expand_planes_kernel,
        (cdiv(n, 128),),
        x.device,
        y_planes_ptr=y_planes,
        s_planes_ptr=s_planes,
        bias_ptr=bias,
        y_ptr=y,
        s_ptr=s,
        M=m,
        N=n,
        splits=splits,
        **{name: term[name] for name in names},
        HAS_BIAS=bias is not None,
        BLOCK_M=16,
        BLOCK_N=128,
        BLOCK_R=block_r(rank),
        num_warps=4,
    )
    return y, s


@triton.jit
def _lora_decode_kernel(
    x_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, a_ptr, y_ptr, s_ptr,
    M, N, K, rank, k_per_split, stride_xm, stride_wn, stride_sn, stride_ar, stride_ak,
    DECODE: tl.constexpr, CODE: tl.constexpr, TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr, K_WIDTH: tl.constexpr, WHOLE_TILES: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[split] (M, N) = x W^T and, by the last program, s[split] (M, rank) = x A^T, over the split's part of K."""
    n0 = tl.program_id(0) * BLOCK_N
    split = tl.program_id(2)
    k_end = tl.minimum(K, (split + 1) * k_per_split)
    if n0 < N:
        m, n = tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        k = columns_of_slots(tl.arange(0, 64), TILED, K_WIDTH)
        acc = words_loop(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x_ptr + m.to(tl.int64)[None, :] * stride_xm + k[:, None],
            packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, m < M,
            split * (k_per_split // BLOCK_K), tl.cdiv(k_end, BLOCK_K), N, K, stride_wn, stride_sn, CODE, TILED, K_WIDTH,
            BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, ABSMAX2, WHOLE_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y_ptrs = y_ptr + (split.to(tl.int64) * M + m)[None, :] * N + n[:, None]
        tl.store(y_ptrs, acc, mask=(n < N)[:, None] & (m < M)[None, :])
    else:
        _store_shrink(
            x_ptr, a_ptr, s_ptr + split * M * rank, M, rank, split * k_per_split, k_end, stride_xm, stride_ar,
            stride_ak, PIECES, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _store_shrink(
    x_ptr, a_ptr, s_ptr, M, rank, k_first, k_end, stride_xm, stride_ar, stride_ak,
    PIECES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s (M, rank) = x A^T over a part of K, which is whole blocks of 64."""
    m, r, k = tl.arange(0, 16), tl.arange(0, BLOCK_R), tl.arange(0, 64)
    m_in, r_in = (m < M)[:, None], (r < rank)[None, :]
    x_ptr += m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    a_ptr += r.to(tl.int64)[None, :] * stride_ar + k[:, None] * stride_ak
    s = tl.zeros([16, BLOCK_R], tl.float32)
    for k0 in range(k_first, k_end, 64):
        x = tl.load(x_ptr + k0, mask=m_in, other=0.0)  # [16, 64]
        s = dot_wide(x, tl.load(a_ptr + k0 * stride_ak, mask=r_in, other=0.0), s, PIECES)
    tl.store(s_ptr + m[:, None] * rank + r[None, :], s, mask=m_in & r_in)


@triton.jit
def _lora_expand_planes_kernel(
    y_planes_ptr, s_planes_ptr, bias_ptr, right_ptr, y_ptr, s_ptr, M, N, rank, splits, scaling, stride_rr, stride_rn,
    HAS_BIAS: tl.constexpr, LORA_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s (M, rank) and y (M, N) = the planes' sums; y + bias + scaling s right."""
    tile = tl.program_id(0)
    m, n, r = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    m_in, n_in, r_in = (m < M)[:, None], (n < N)[None, :], r < rank
    s_offset, y_offset = m[:, None] * rank + r[None, :], m.to(tl.int64)[:, None] * N + n[None, :]
    right = tl.load(
        right_ptr + r[:, None] * stride_rr + n.to(tl.int64)[None, :] * stride_rn, mask=r_in[:, None] & n_in, other=0.0
    )
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(splits):
        s += tl.load(s_planes_ptr + s_offset, mask=m_in & r_in[None, :], other=0.0)
        y += tl.load(y_planes_ptr + y_offset, mask=m_in & n_in, other=0.0)
        s_planes_ptr += M * rank
        y_planes_ptr += tl.cast(M, tl.int64) * N
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y += scaling * low_rank_dot(s, right, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), LORA_PIECES)
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=m_in & n_in)
    if tile == 0:
        tl.store(s_ptr + s_offset, s, mask=m_in & r_in[None, :])
