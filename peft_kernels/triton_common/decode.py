"""4-bit codes to values on the device: block scales, and a tile of the weight in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.nf4.reference import CODES
from .device import INTERPRET

# 16-bit codes are code * MULTIPLIER, rounded, and scales are divided by it. Rounded alone, NF4's codes would be off by
# the same 2^-9 (bfloat16) wherever they occur: over inputs of one sign that adds up to 9 times the error of a weight
# rounded to bfloat16. These multipliers make the rounding errors small and let them cancel over a Gaussian weight, so
# that scaled sums are nearer to the exact product than a rounded weight is; FP4's codes are twelfths, hence exact.
MULTIPLIER = {
    "nf4": {torch.bfloat16: 1.188751220703125, torch.float16: 1.3886146545410156, torch.float32: 1.0},
    "fp4": {torch.bfloat16: 12.0, torch.float16: 12.0, torch.float32: 1.0},
}


def multiplied_codes(quant_type: str, dtype: torch.dtype) -> torch.Tensor:
    """The 16 codes as `decode_words` yields them."""
    return (torch.tensor(CODES[quant_type], dtype=torch.float64) * MULTIPLIER[quant_type][dtype]).to(dtype)


def decode_asm(code: torch.Tensor, scaled: bool = False, tiled: bool = False) -> str:
    """PTX that maps the eight 4-bit codes of word $8 to values $0 ... $7, as they follow each other in the weight.

    tiled: the high nibbles of two neighbouring bytes, then their low ones, then the next two bytes'.

    A byte permute looks up four nibbles at once in a table of eight bytes: two of them and a selection by the nibble's
    top bit serve 16 entries. One such plane holds the lowest bytes of the values, another the next ones, and so on.

    code: (16,) of 16 or 32 bits. scaled: times $9, of the same 16-bit dtype.
    """
    octets = code.view(-1, 1).view(torch.uint8)  # (16, bytes)
    planes = [f"p{i}" for i in range(octets.shape[1])]
    tables = [octets[:, i].contiguous().view(torch.int32).tolist() for i in range(len(planes))]
    lines = [
        "{ .reg .b32 q, s, u, v, pair, other, factor, z, top, own;",
        *(f".reg .b32 {name}, {name}a, {name}b;" for name in planes),
        # A zero that ptxas cannot see through: it would put a constant into a register again before each use, one more
        # instruction for every permute.
        "mov.u32 z, %lanemask_lt;",
        "shr.u32 z, z, 31;",
    ]
    for name, table in zip(planes, tables, strict=True):
        lines += [f"xor.b32 {name}a, z, {_hex(table[0])};", f"xor.b32 {name}b, z, {_hex(table[2])};"]
    lines += [
        "xor.b32 top, z, 0x44444444;",
        "xor.b32 own, z, 0x32103210;",
        "shr.b32 s, $8, 1;",
        "lop3.b32 s, s, top, own, 0xEA;",  # (s & top) | own
        "and.b32 q, $8, 0x77777777;",
        *(["mov.b32 factor, {$9, $9};"] if scaled else []),
    ]
    for half in (0, 4):
        if half:
            lines += ["shr.b32 q, q, 16;", "shr.b32 s, s, 16;"]
        for name, table in zip(planes, tables, strict=True):
            lines += [
                f"prmt.b32 u, {name}a, {_hex(table[1])}, q;",
                f"prmt.b32 v, {name}b, {_hex(table[3])}, q;",
                f"prmt.b32 {name}, u, v, s;",
            ]
        # a byte's high nibble comes first
        for i, selector in zip((half, half + 2), ("0x7351", "0x6240") if tiled else ("0x4051", "0x6273"), strict=True):
            lines.append(f"prmt.b32 pair, p0, p1, {selector};")
            if len(planes) == 4:
                lines.append(f"prmt.b32 other, p2, p3, {selector};")
                lines += [f"prmt.b32 ${i}, pair, other, 0x5410;", f"prmt.b32 ${i + 1}, pair, other, 0x7632;"]
            else:
                lines += [_MULTIPLY[code.dtype]] if scaled else []
                lines.append(f"mov.b32 {{${i}, ${i + 1}}}, pair;")
    return "\n".join([*lines, "}"])


def _hex(word: int) -> str:
    return f"{word & 0xFFFFFFFF:#x}"


# bfloat16 has no product of its own before sm_90; adding -0 changes nothing
_MULTIPLY = {
    torch.bfloat16: "{ .reg .b32 m; mov.b32 m, 0x80008000; fma.rn.bf16x2 pair, pair, factor, m; }",
    torch.float16: "mul.rn.f16x2 pair, pair, factor;",
}
# What kernels take as CODE: an index into this list.
CODE_KINDS = [(quant_type, dtype) for quant_type in CODES for dtype in MULTIPLIER[quant_type]]
# A code's in bitsandbytes' layout at 2 CODE, in the tiled one at 2 CODE + 1.
_ASM = tl.constexpr(tuple(decode_asm(multiplied_codes(*kind), False, bool(i)) for kind in CODE_KINDS for i in (0, 1)))
_ASM_SCALED = tl.constexpr(
    tuple(
        "" if kind[1] == torch.float32 else decode_asm(multiplied_codes(*kind), True, bool(i))
        for kind in CODE_KINDS
        for i in (0, 1)
    )
)
_OUTPUTS = tl.constexpr(tuple(("=r," if kind[1] == torch.float32 else "=h,") * 8 for kind in CODE_KINDS))
_DTYPE = tl.constexpr(tuple(getattr(tl, str(dtype).removeprefix("torch.")) for _, dtype in CODE_KINDS))
_MULTIPLIER = tl.constexpr(tuple(MULTIPLIER[quant_type][dtype] for quant_type, dtype in CODE_KINDS))


@triton.jit
def block_scale(
    block, mask, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr
):
    """The float32 scales of the blocks numbered `block`. Launch with enable_fp_fusion=False: two roundings, no FMA."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        absmax2 = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(code2_ptr + absmax.to(tl.int32)) * absmax2 + tl.load(offset_ptr)
    else:
        return absmax


@triton.jit
def decode_words(
    words, scale, code_ptr, CODE: tl.constexpr, TILED: tl.constexpr, SCALED: tl.constexpr = False,
    PERMUTE: tl.constexpr = not INTERPRET,
):  # fmt: skip
    """[N, W, 2, 2, 2] codes of [N, W] words, as `natural_order` takes them; SCALED: times scale (N, W / 8).

    The codes come multiplied by their type's MULTIPLIER, so the scales must come from `unit_scale`. PERMUTE: by byte
    permute (NVIDIA's) rather than from the table in memory.
    """
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if SCALED:
        factor = tl.broadcast_to(scale.to(_DTYPE[CODE])[:, :, None], [N, W // 8, 8]).reshape(N, W)
    if not PERMUTE:
        i = tl.arange(0, 8)
        # a byte's high nibble comes first
        shift = 16 * (i // 4) + 8 * (i % 2) + 4 - 4 * (i // 2 % 2) if TILED else 4 * (i ^ 1)
        code = (words[:, :, None] >> shift[None, None, :]) & 0xF
        values = (tl.load(code_ptr + code) * _MULTIPLIER[CODE]).to(_DTYPE[CODE])
        if SCALED:
            values *= factor[:, :, None]
        return values.reshape(N, W, 2, 2, 2)
    else:
        if SCALED:
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _ASM_SCALED[2 * CODE + TILED],
                _OUTPUTS[CODE] + "r,h",
                [words, factor],
                (_DTYPE[CODE],) * 8,
                is_pure=True,
                pack=1,
            )
        else:
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _ASM[2 * CODE + TILED], _OUTPUTS[CODE] + "r", [words], (_DTYPE[CODE],) * 8, is_pure=True, pack=1
            )
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
        return tl.join(even, odd)


@triton.jit
def natural_order(codes, TILED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of codes that come as `decode_words` yields them."""
    if TILED:  # thread, c, half, e -> half, c, thread, e; see `ops.nf4.layout`
        codes = codes.reshape(ROWS, COLUMNS // 64, 4, 4, 2, 2).permute(0, 1, 4, 3, 2, 5)
    return codes.reshape(ROWS, COLUMNS)


@triton.jit
def byte_order(codes, TILED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of codes that come byte by byte, each byte's high nibble first."""
    if TILED:
        codes = codes.reshape(ROWS, COLUMNS // 4, 2, 2).permute(0, 1, 3, 2)
    return natural_order(codes, TILED, ROWS, COLUMNS)


@triton.jit
def unit_scale(scale, CODE: tl.constexpr):
    """The scale that belongs to codes of `decode_words`."""
    return scale * (1.0 / _MULTIPLIER[CODE])


@triton.jit
def load_weight_tile(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, k0, N, K, stride_wn, stride_sn,
    DTYPE: tl.constexpr, DECODE: tl.constexpr, TILED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[n0 : n0 + BLOCK_N, k0 : k0 + BLOCK_K] as DTYPE, zero outside.

    DECODE "any" takes every shape element by element. "lut" wants K to be a multiple of BLOCKSIZE, so that rows are
    whole blocks; stride_wn is then the bytes and stride_sn the scales of a row.
    """
    n = tl.arange(0, BLOCK_N)
    if DECODE == "any":
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n0 + n < N)[:, None] & (k < K)[None, :]
        flat = (n0 + n).to(tl.int64)[:, None] * K + k[None, :]
        byte = tl.load(packed_ptr + flat // 2, mask=inside, other=0).to(tl.int32)
        nibble = tl.where(flat % 2 == 0, byte >> 4, byte & 0xF)
        scale = block_scale(
            flat // BLOCKSIZE, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED, NESTED_BLOCKSIZE
        )
        return (tl.load(code_ptr + nibble, mask=inside, other=0.0) * scale).to(DTYPE)
    else:
        GROUPS: tl.constexpr = (BLOCK_K + BLOCKSIZE - 1) // BLOCKSIZE
        n_in = n < N - n0
        half = tl.arange(0, BLOCK_K // 2)
        packed_ptr += tl.cast(n0, tl.int64) * stride_wn + k0 // 2
        inside = n_in[:, None] & (half < (K - k0) // 2)[None, :]
        packed = tl.load(packed_ptr + n[:, None] * stride_wn + half[None, :], mask=inside, other=0)
        byte = packed.to(tl.int32)
        high = tl.load(code_ptr + (byte >> 4))
        low = tl.load(code_ptr + (byte & 0xF))
        codes = byte_order(tl.join(high, low), TILED, BLOCK_N, BLOCK_K)
        # a block's number as int64 only through its row's start: rows past 2^31 elements stay addressable
        group = k0 // BLOCKSIZE + tl.arange(0, GROUPS)
        block = tl.cast(n0, tl.int64) * stride_sn + n[:, None] * stride_sn + group[None, :]
        # zero scales outside N and K make the weight zero there
        scale = block_scale(
            block, n_in[:, None] & (group < stride_sn)[None, :], absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr,
            NESTED, NESTED_BLOCKSIZE,
        )  # fmt: skip
        if NESTED:
            scale = tl.where(n_in[:, None] & (group < stride_sn)[None, :], scale, 0.0)
        if GROUPS == 1:
            return (codes * scale).to(DTYPE)
        else:
            scaled = codes.reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS) * scale[:, :, None]
            return scaled.reshape(BLOCK_N, BLOCK_K).to(DTYPE)
