"""Device functions that the operations share: dots, the dropout mask, the adapters' low-rank product."""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreting

INTERPRET = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc):
    """acc + a b of 16-bit operands. The interpreter's product of bfloat16 is garbage: upcast there."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_float32(a, b, acc):
    """acc + a b as accurate as float32, by six bfloat16 products: faster than FMA units, and never TF32."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee" if INTERPRET else "bf16x6")


@triton.jit
def dot_wide(x, w, acc, PIECES: tl.constexpr):
    """acc + x w, w as accurate as PIECES says. 1: rounded to x's dtype. 6: both float32. 3: x is bfloat16, w a sum of
    three bfloat16 with 24 bits together. Each call is summed apart: tensor cores cut off, at every product, what their
    accumulator cannot hold, and over a long sum that loses more than float32's rounding does.
    """
    if PIECES == 1:
        return dot(x, w.to(x.dtype), acc)
    elif PIECES == 3:
        w = w.to(tl.float32)
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return acc + dot(x, high, dot(x, middle, dot(x, low, tl.zeros_like(acc))))
    else:
        return dot_float32(x, w, acc)


@triton.jit
def dropout_keep(seed_ptr, threshold, m0, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mask of rows m0.. and columns k0.. (k0 a multiple of 4); see `peft_kernels.dropout`."""
    quad = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    row = m0 + tl.arange(0, BLOCK_M)
    zero = tl.zeros([BLOCK_M, BLOCK_K // 4], tl.int32)
    # one Philox call yields the words of four neighbouring columns
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero + quad[None, :], zero + row[:, None], zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_K)
    return words >= threshold.to(tl.uint32)


@triton.jit
def apply_dropout(
    x, seed_ptr, threshold, inverse_keep, m0, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """x where kept, times 1 / (1 - p); zero where dropped."""
    return tl.where(dropout_keep(seed_ptr, threshold, m0, k0, BLOCK_M, BLOCK_K), x * inverse_keep, 0.0)


@triton.jit
def _bfloat16_pair(x):
    """x as high + low, both bfloat16."""
    x = x.to(tl.float32)
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def low_rank_dot(a, b, acc, LORA_PIECES: tl.constexpr):
    """acc + a b, one of them an adapter's matrix and the other float32; LORA_PIECES as for `lora_seed`."""
    if LORA_PIECES == 1:
        if a.dtype == tl.float32:
            a = a.to(b.dtype)
        return dot(a, b.to(a.dtype), acc)
    elif LORA_PIECES == 6:
        return dot_float32(a, b, acc)
    else:
        a_high, a_low = _bfloat16_pair(a)
        b_high, b_low = _bfloat16_pair(b)
        return dot(a_high, b_high, dot(a_low, b_high, dot(a_high, b_low, acc)))


@triton.jit
def lora_seed(
    a_ptr, b_ptr, acc, row0, col0, rows, cols, rank, stride_ar, stride_ak, stride_bc, stride_bk,
    LORA_PIECES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + a b^T for a tile of a (rows, rank) and of b (cols, rank), in BLOCK_R columns at a time.

    One of them is an adapter's matrix, the other float32. LORA_PIECES 1: a product in the adapter's 16-bit dtype. 3:
    each side as a pair of bfloat16 (16 bits together), ample for a sum that ends in 16 bits. 6: float32.
    """
    row = row0 + tl.arange(0, BLOCK_ROWS)
    col = col0 + tl.arange(0, BLOCK_COLS)
    r = tl.arange(0, BLOCK_R)
    a_ptr += row.to(tl.int64)[:, None] * stride_ar
    b_ptr += col.to(tl.int64)[None, :] * stride_bc
    for r0 in range(0, rank, BLOCK_R):
        inside = r0 + r < rank
        a = tl.load(a_ptr + (r0 + r)[None, :] * stride_ak, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr + (r0 + r)[:, None] * stride_bk, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
        acc = low_rank_dot(a, b, acc, LORA_PIECES)
    return acc
