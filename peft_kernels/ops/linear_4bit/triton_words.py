"""The main loops over a 4-bit weight that is decoded in registers word by word, eight codes each."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.decode import decode_words, natural_order, unit_scale
from ...triton_common.device import dot


@triton.jit
def columns_of_slots(slot, TILED: tl.constexpr, K_WIDTH: tl.constexpr):
    """Which of 64 columns of K stands in each slot of the product, so that threads decode whole words.

    In a tensor core's first operand, thread t of four holds K_WIDTH slots of every 4 K_WIDTH: slots 2 t, 2 t + 1 of
    each group of eight (wgmma), or 4 t ... 4 t + 3 of each sixteen (what Triton makes of mma.sync here). Its columns
    are those of its two words, 16 t ... 16 t + 15 in bitsandbytes' layout; x's rows are put in the same order.
    """
    if K_WIDTH == 2:
        if TILED:
            return slot
        return tl.max_contiguous(tl.multiple_of((slot & 1) | ((slot >> 2) & 0xE) | ((slot & 6) << 3), 2), 2)
    elif TILED:
        return tl.max_contiguous(tl.multiple_of((slot & 1) | (slot & 2) << 4 | (slot >> 1) & 0x1E, 2), 2)
    else:
        return tl.max_contiguous(tl.multiple_of((slot & 3) | (slot & 0xC) << 2 | (slot & 0x30) >> 2, 4), 4)


@triton.jit
def _slots_of_words(w, TILED: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, 8, 2, 2, 2] values of `decode_words` as [BLOCK_N, 64], in the order of `columns_of_slots`."""
    if K_WIDTH == 4:
        w = w.reshape(BLOCK_N, 4, 4, 4).permute(0, 2, 1, 3)
    elif TILED:
        return natural_order(w, TILED, BLOCK_N, 64)
    else:
        w = w.reshape(BLOCK_N, 4, 2, 2, 2, 2).permute(0, 2, 3, 4, 1, 5)
    return w.reshape(BLOCK_N, 64)


@triton.jit
def _load_statistics(
    absmax_ptr, absmax2_ptr, i, row, row_in, K, stride_sn,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """What the scales of the rows' i-th GROUPS groups of 64 weights are made of: absmax [rows, GROUPS], absmax2.

    ABSMAX2: how many different absmax2 a row's GROUPS neighbours have, 1 or GROUPS.
    """
    group = tl.arange(0, GROUPS)[None, :]
    inside = row_in[:, None] & (i * GROUPS + group < K // 64)
    # block numbers stay below 2^31 for every weight of less than 2^37 elements
    if BLOCKSIZE == 64:
        block = row[:, None] * stride_sn + i * GROUPS + group
    else:
        block = row[:, None] * stride_sn + (i * GROUPS + group) * 64 // BLOCKSIZE
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if not NESTED:
        return absmax, absmax
    elif ABSMAX2 == 1:
        first = row[:, None] * stride_sn + i * GROUPS * 64 // BLOCKSIZE
        inside = row_in[:, None] & (i * GROUPS < K // 64)
        return absmax, tl.load(absmax2_ptr + first // NESTED_BLOCKSIZE, mask=inside, other=0.0)
    else:
        return absmax, tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)


@triton.jit
def _unit_scales(absmax, absmax2, code2_ptr, offset, CODE: tl.constexpr, NESTED: tl.constexpr):
    """[rows, GROUPS] scales for codes of `decode_words`; offset: a unit one as well."""
    if NESTED:
        absmax2 = tl.broadcast_to(unit_scale(absmax2, CODE), absmax.shape)
        return tl.fma(tl.load(code2_ptr + absmax.to(tl.int32)), absmax2, tl.broadcast_to(offset, absmax.shape))
    else:
        return unit_scale(absmax, CODE)


@triton.jit
def _row_of_scale(i, BLOCK_N: tl.constexpr):
    """Which row's scales the i-th thread makes: rows that its own warp multiplies, so that no barrier is needed."""
    return i % 2 * (BLOCK_N // 2) + i // 2


@triton.jit
def _rows_in_order(scale, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_N, 1, GROUPS], its rows put in order that were computed in that of `_row_of_scale`."""
    return scale.reshape(BLOCK_N // 2, 2, GROUPS).permute(1, 0, 2).reshape(BLOCK_N, 1, GROUPS)


@triton.jit
def _group(x, g: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """x[:, :, g] of [ROWS, COLUMNS, GROUPS], GROUPS 1, 2 or 4."""
    if GROUPS == 1:
        return x.reshape(ROWS, COLUMNS)
    elif GROUPS == 2:
        first, second = tl.split(x)
        return second if g else first
    else:
        even, odd = tl.split(x.reshape(ROWS, COLUMNS, 2, 2))
        first, second = tl.split(odd if g % 2 else even)
        return second if g // 2 else first


@triton.jit
def _add_words_product(
    acc, x, words, scale, code_ptr, CODE: tl.constexpr, TILED: tl.constexpr, K_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc + scale W x for words of W (BLOCK_N, 64); x (64, BLOCK_M) in the order of `columns_of_slots`."""
    # few rows: scaling their float32 sums costs less than scaling the weight, and rounds nothing
    AFTER: tl.constexpr = BLOCK_M <= 32
    w = decode_words(words, scale, code_ptr, CODE, TILED, SCALED=not AFTER)  # [BLOCK_N, 8, 2, 2, 2]
    w = _slots_of_words(w, TILED, K_WIDTH, BLOCK_N)
    if AFTER:
        product = dot(w, x, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        return tl.fma(product, tl.broadcast_to(scale, product.shape), acc)
    else:
        return dot(w, x, acc)


@triton.jit
def words_loop(
    acc, x_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, m_in, first, last,
    N, K, stride_wn, stride_sn,
    CODE: tl.constexpr, TILED: tl.constexpr, K_WIDTH: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr, WHOLE_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + W x over the first to last - 1 of K's steps; x_ptr: [64, BLOCK_M] pointers to the first 64 rows of x."""
    GROUPS: tl.constexpr = BLOCK_K // 64
    n = tl.arange(0, BLOCK_N)
    row = _row_of_scale(n, BLOCK_N)
    row_in = row < N - n0
    offset = unit_scale(tl.load(offset_ptr), CODE) if NESTED else 0.0
    # group by group in shared memory: rows 32 bytes apart, which no bank conflict slows down
    group, word = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, 8)[None, None, :]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tl.cast(n0, tl.int64) * (stride_wn // 4)
    words_ptr += n[None, :, None] * (stride_wn // 4) + (group * 8 + word)
    # the scales come one step ahead: what they are made of is no operand of a product, so nothing else prefetches it
    absmax, absmax2 = _load_statistics(
        absmax_ptr, absmax2_ptr, first, n0 + row, row_in, K, stride_sn, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, ABSMAX2,
        GROUPS,
    )  # fmt: skip
    for i in range(first, last):
        words_in = (n < N - n0)[None, :, None] & (i * GROUPS + group < K // 64)
        if WHOLE_TILES:
            words = tl.load(words_ptr + i * (BLOCK_K // 8)).permute(1, 2, 0)
        else:
            words = tl.load(words_ptr + i * (BLOCK_K // 8), mask=words_in, other=0).permute(1, 2, 0)
        scales = _rows_in_order(_unit_scales(absmax, absmax2, code2_ptr, offset, CODE, NESTED), BLOCK_N, GROUPS)
        absmax, absmax2 = _load_statistics(
            absmax_ptr, absmax2_ptr, i + 1, n0 + row, row_in, K, stride_sn, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
            ABSMAX2, GROUPS,
        )  # fmt: skip
        for g in tl.static_range(GROUPS):
            x_in = m_in[None, :] & (WHOLE_TILES or i * GROUPS + g < K // 64)
            x = tl.load(x_ptr + (i * BLOCK_K + g * 64), mask=x_in, other=0.0)  # [64, BLOCK_M]
            acc = _add_words_product(
                acc, x, _group(words, g, BLOCK_N, 8, GROUPS), _group(scales, g, BLOCK_N, 1, GROUPS), code_ptr, CODE,
                TILED, K_WIDTH, BLOCK_N, BLOCK_M,
            )  # fmt: skip
    return acc


@triton.jit
def transposed_words_loop(
    acc, dy_ptr, packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, tile, m_in, first, last,
    N, K, stride_wn, stride_sn,
    CODE: tl.constexpr, TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, ABSMAX2: tl.constexpr, WHOLE_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + dy W for the tile-th BLOCK_K columns of W, over the first to last - 1 of N's steps."""
    GROUPS: tl.constexpr = BLOCK_K // 64
    n = tl.arange(0, BLOCK_N)
    offset = unit_scale(tl.load(offset_ptr), CODE) if NESTED else 0.0
    group, word = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, 8)[None, None, :]
    row = n[:, None, None] * (stride_wn // 4)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile * (BLOCK_K // 8) + (row + (group * 8 + word))
    absmax, absmax2 = _load_statistics(
        absmax_ptr, absmax2_ptr, tile, first * BLOCK_N + n, n < N - first * BLOCK_N, K, stride_sn, BLOCKSIZE, NESTED,
        NESTED_BLOCKSIZE, ABSMAX2, GROUPS,
    )  # fmt: skip
    for i in range(first, last):
        n0 = i * BLOCK_N
        step_ptr = words_ptr + tl.cast(n0, tl.int64) * (stride_wn // 4)
        if WHOLE_TILES:
            dy = tl.load(dy_ptr + n0, mask=m_in[:, None], other=0.0)  # [BLOCK_M, BLOCK_N]
            words = tl.load(step_ptr)
        else:
            dy = tl.load(dy_ptr + n0, mask=m_in[:, None] & (n < N - n0)[None, :], other=0.0)
            words_in = (n < N - n0)[:, None, None] & (tile * GROUPS + group < K // 64)
            words = tl.load(step_ptr, mask=words_in, other=0)
        scale = _unit_scales(absmax, absmax2, code2_ptr, offset, CODE, NESTED)
        absmax, absmax2 = _load_statistics(
            absmax_ptr, absmax2_ptr, tile, n0 + BLOCK_N + n, n < N - n0 - BLOCK_N, K, stride_sn, BLOCKSIZE, NESTED,
            NESTED_BLOCKSIZE, ABSMAX2, GROUPS,
        )  # fmt: skip
        w = decode_words(words.reshape(BLOCK_N, BLOCK_K // 8), scale, code_ptr, CODE, TILED, SCALED=True)
        acc = dot(dy, natural_order(w, TILED, BLOCK_N, BLOCK_K), acc)
    return acc
