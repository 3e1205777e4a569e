"""The codec on the GPU: quantize in one launch, dequantize in one launch with nested statistics too."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ...triton_common import why_not_tensors
from ...triton_common.decode import CODE_KINDS, block_scale, byte_order, decode_words, natural_order
from ...triton_common.decode_exact import EXACT_KINDS, decode_exact
from ...triton_common.launch import cdiv, launch, target
from .reference import code_book, tensor_cache

if TYPE_CHECKING:
    from ...weight4bit import Weight4bit

# A thread loads four words of eight codes at once, 16 bytes, and stores 16 bytes at a time.
_WORDS_PER_THREAD, _WARPS = 4, 4
# A launch is below every mode: it need not look for one at each call.
_code_book = functools.cache(code_book)


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton codec cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


@tensor_cache
def _decision_tables(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The midpoints of the sorted code (15,), and which 4-bit code each interval between them has (16,)."""
    code, order = code_book(quant_type, device).sort(stable=True)
    return (code[:-1] + code[1:]) / 2, order.to(torch.uint8)


def quantize(flat: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat (n,) -> packed (ceil(n / 2),) uint8, absmax (ceil(n / blocksize),) float32."""
    n = flat.numel()
    blocks = cdiv(n, blocksize)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    midpoints, order = _decision_tables(quant_type, flat.device)
    per_program = max(2048 // blocksize, 1)
    launch(
        _nf4_quantize_kernel,
        (cdiv(blocks, per_program),),
        flat.device,
        x_ptr=flat,
        midpoints_ptr=midpoints,
        order_ptr=order,
        packed_ptr=packed,
        absmax_ptr=absmax,
        numel=n,
        BLOCKSIZE=blocksize,
        BLOCKS=per_program,
        num_warps=_WARPS,
    )
    return packed, absmax


def dequantize(
    weight: Weight4bit,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> torch.Tensor:
    """W (N, K) or a window of it, into `out` (a tensor of the result's shape) where given.

    rows: any; columns: whole blocks, and all of them where blocks straddle rows: then `out` is contiguous. Else its
    rows may lie apart.
    """
    n, k = weight.shape
    n0, n1, _ = rows.indices(n)
    k0, k1, _ = columns.indices(k)
    out = torch.empty((n1 - n0, k1 - k0), dtype=dtype, device=weight.packed.device) if out is None else out
    numel = (n1 - n0) * (k1 - k0)
    blocks, words = cdiv(numel, weight.blocksize), weight.blocksize // 8
    per_program = max(_WORDS_PER_THREAD * 32 * _WARPS // words, 1)
    launch(
        _nf4_dequantize_kernel,
        (cdiv(blocks, per_program),),
        out.device,
        **statistics(weight),
        out_ptr=out,
        numel=numel,
        first_block=(n0 * k + k0) // weight.blocksize,
        window_blocks=(k1 - k0) // weight.blocksize,
        row_blocks=k // weight.blocksize,
        CODE=CODE_KINDS.index((weight.quant_type, torch.float32)),  # the result is exact
        **_way(weight, out, numel),
        stride_on=out.stride(0),
        WINDOW=k1 - k0 != k or not out.is_contiguous(),
        APART=not out.is_contiguous(),
        BLOCKS=per_program,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _way(weight: Weight4bit, out: torch.Tensor, numel: int) -> dict[str, Any]:
    """WORDS: eight codes at a time. PERMUTE: by byte permute, NVIDIA's. EXACT: 16-bit pairs, see `decode_exact`."""
    words = numel % weight.blocksize == 0 and weight.packed.data_ptr() % 4 == 0
    permute = target(out.device).kind == "cuda"
    kind = weight.quant_type, out.dtype
    exact = words and permute and kind in EXACT_KINDS and out.data_ptr() % 4 == 0
    return {"WORDS": words, "PERMUTE": permute, "EXACT": EXACT_KINDS.index(kind) if exact else None}


def statistics(weight: Weight4bit) -> dict[str, Any]:
    """The arguments by which every kernel takes a Weight4bit."""
    nested = weight.nested
    return {
        "packed_ptr": weight.packed,
        "absmax_ptr": weight.absmax,
        "absmax2_ptr": None if nested is None else nested.absmax2,
        "code2_ptr": None if nested is None else nested.code,
        "offset_ptr": None if nested is None else nested.offset,
        "code_ptr": _code_book(weight.quant_type, weight.packed.device),
        "TILED": weight.layout == "tiled",
        "BLOCKSIZE": weight.blocksize,
        "NESTED": nested is not None,
        "NESTED_BLOCKSIZE": 1 if nested is None else nested.blocksize,
    }


@triton.jit
def _nf4_quantize_kernel(
    x_ptr, midpoints_ptr, order_ptr, packed_ptr, absmax_ptr, numel, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offset = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=1)
    poisoned = tl.max((x != x).to(tl.int32), axis=1) > 0  # tl.max drops NaN, torch keeps it
    absmax = tl.where(poisoned, float("nan"), absmax)
    divisor = tl.where(absmax < 1e-38, 1e-38, absmax)
    # bitsandbytes multiplies by the reciprocal in whole blocks; in a partial one it divides and stores the clamped one
    partial = block == numel // BLOCKSIZE
    reciprocal = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    scaled = tl.where(partial[:, None], quotient, x * reciprocal[:, None])
    index = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)
    for i in tl.static_range(15):
        # a tie takes the lower code; NaN compares false and takes the highest, as torch's bucketize gives it
        index += (~(scaled <= tl.load(midpoints_ptr + i))).to(tl.int32)
    nibble = tl.load(order_ptr + index).to(tl.int32)
    high, low = tl.split(nibble.reshape(BLOCKS, BLOCKSIZE // 2, 2))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (numel + 1) // 2)
    tl.store(absmax_ptr + block, tl.where(partial, divisor, absmax), mask=block * BLOCKSIZE < numel)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, out_ptr,
    numel, first_block, window_blocks, row_blocks, stride_on,
    TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    CODE: tl.constexpr, WINDOW: tl.constexpr, APART: tl.constexpr, WORDS: tl.constexpr, PERMUTE: tl.constexpr,
    EXACT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out (numel,) = the blocks from first_block on. WINDOW: window_blocks of every row_blocks; APART: rows' stride."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(numel - first * BLOCKSIZE, BLOCKS * BLOCKSIZE).to(tl.int32)  # elements of this program
    local = tl.arange(0, BLOCKS)
    if WINDOW:
        block = tl.program_id(0) * BLOCKS + local  # a 64-bit division would cost as much as the decode
        row, column = (block // window_blocks).to(tl.int64), block % window_blocks
        source = first_block + row * row_blocks + column
    else:
        source = first_block + first + local
    if APART:
        to = row * stride_on + column * BLOCKSIZE
    else:
        to = local * BLOCKSIZE
        out_ptr += first * BLOCKSIZE
    inside = local * BLOCKSIZE < left
    scale = block_scale(source, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED, NESTED_BLOCKSIZE)
    if WORDS:  # whole blocks, so that a mask for each block leaves the accesses as wide as they can be
        COUNT: tl.constexpr = BLOCKSIZE // 8
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + source[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        words = tl.load(words_ptr, mask=inside[:, None], other=0)
        if EXACT is not None:
            pairs = decode_exact(words, tl.broadcast_to(scale[:, None], words.shape), EXACT, TILED)
            pairs_ptr = out_ptr.to(tl.pointer_type(tl.int32)) + (to // 2)[:, None]
            tl.store(pairs_ptr + tl.arange(0, BLOCKSIZE // 2)[None, :], pairs, mask=inside[:, None])
            return
        values = decode_words(words, scale, code_ptr, CODE, TILED, PERMUTE=PERMUTE)
        values = natural_order(values, TILED, BLOCKS, BLOCKSIZE)
    else:
        byte = local[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
        packed_ptr += source[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
        packed = tl.load(packed_ptr, mask=byte * 2 < left, other=0).to(tl.int32)
        values = tl.join(tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 0xF)))
        values = byte_order(values, TILED, BLOCKS, BLOCKSIZE)
    values = (values * scale[:, None]).to(out_ptr.dtype.element_ty)
    within = tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + to[:, None] + within, values, mask=local[:, None] * BLOCKSIZE + within < left)
