"""Fused GEMMs over a 4-bit weight, for few rows: the tile is decoded in registers, the adapters' part comes along."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.decode import load_weight_tile
from ...triton_common.device import apply_dropout, dot, lora_seed
from .triton_words import columns_of_slots, transposed_words_loop, words_loop


@triton.jit
def _linear_4bit_fwd_kernel(
    x_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, bias_ptr, left_ptr, right_ptr, out_ptr,
    out_scale_ptr,
    M, N, K, rank, k_per_split, scaling, stride_xm, stride_wn, stride_sn, stride_lm, stride_rr, stride_rn,
    DECODE: tl.constexpr, CODE: tl.constexpr, TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr, K_WIDTH: tl.constexpr, WHOLE_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, LORA_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] (M, N) = x W^T over the split's part of K; split 0 also holds bias + scaling * left right^T.

    Computed as W x^T: the decoded tile is then the operand that Hopper's wgmma takes from registers, and few rows of x
    are the narrow side of the product.
    """
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    m = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first_rows = tl.where(split == 0, N, 0)
    if HAS_LORA:
        acc = lora_seed(
            right_ptr, left_ptr, acc, n0, m0, first_rows, M, rank, stride_rn, stride_rr, stride_lm, 1, LORA_PIECES,
            BLOCK_N, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        acc *= scaling
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n0 + n, mask=n0 + n < first_rows, other=0.0).to(tl.float32)[:, None]

    k_end = tl.minimum(K, (split + 1) * k_per_split)
    if DECODE == "words":
        k = columns_of_slots(tl.arange(0, 64), TILED, K_WIDTH)
        x_ptr += m.to(tl.int64)[None, :] * stride_xm + k[:, None]
        acc = words_loop(
            acc, x_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, m < M,
            split * (k_per_split // BLOCK_K), tl.cdiv(k_end, BLOCK_K), N, K, stride_wn, stride_sn, CODE, TILED, K_WIDTH,
            BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, ABSMAX2, WHOLE_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        k = tl.arange(0, BLOCK_K)
        x_ptr += m.to(tl.int64)[None, :] * stride_xm + k[:, None]
        for k0 in range(split * k_per_split, k_end, BLOCK_K):
            x = tl.load(x_ptr + k0, mask=(m < M)[None, :] & (k < K - k0)[:, None], other=0.0)  # [BLOCK_K, BLOCK_M]
            w = load_weight_tile(
                packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, k0, N, K, stride_wn,
                stride_sn, x.dtype, DECODE, TILED, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = dot(w, x, acc)
    if out_scale_ptr is not None:
        acc *= tl.load(out_scale_ptr + n0 + n, mask=n0 + n < N, other=0.0)[:, None]
    out_ptr += (split.to(tl.int64) * M + m)[None, :] * N + (n0 + n)[:, None]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(n0 + n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _linear_4bit_bwd_kernel(
    dy_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, left_ptr, right_ptr, seed_ptr,
    out_ptr,
    M, N, K, rank, n_per_split, scaling, threshold, inverse_keep,
    stride_ym, stride_wn, stride_sn, stride_lm, stride_rr, stride_rn,
    DECODE: tl.constexpr, CODE: tl.constexpr, TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr, WHOLE_TILES: tl.constexpr,
    HAS_LORA: tl.constexpr, LORA_PIECES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] (M, K) = dy W over the split's part of N; split 0 also holds mask * (left right)."""
    k0 = tl.program_id(0) * BLOCK_K
    m0 = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    k = k0 + tl.arange(0, BLOCK_K)
    m = m0 + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if HAS_LORA:
        acc = lora_seed(
            left_ptr, right_ptr, acc, m0, k0, tl.where(split == 0, M, 0), K, rank, stride_lm, 1, stride_rn, stride_rr,
            LORA_PIECES, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        acc *= scaling
        if DROPOUT:
            acc = apply_dropout(acc, seed_ptr, threshold, inverse_keep, m0, k0, BLOCK_M, BLOCK_K)

    dy_ptr += m.to(tl.int64)[:, None] * stride_ym + n[None, :]
    n_end = tl.minimum(N, (split + 1) * n_per_split)
    if DECODE == "words":
        acc = transposed_words_loop(
            acc, dy_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, tl.program_id(0), m < M,
            split * (n_per_split // BLOCK_N), tl.cdiv(n_end, BLOCK_N), N, K, stride_wn, stride_sn, CODE, TILED,
            BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, ABSMAX2, WHOLE_TILES, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        for n0 in range(split * n_per_split, n_end, BLOCK_N):
            dy = tl.load(dy_ptr + n0, mask=(m < M)[:, None] & (n < N - n0)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
            w = load_weight_tile(
                packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, k0, N, K, stride_wn,
                stride_sn, dy.dtype, DECODE, TILED, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = dot(dy, w, acc)
    out_ptr += (split.to(tl.int64) * M + m)[:, None] * K + k[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])
