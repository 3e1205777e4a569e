"""4-bit codes to values on the device: block scales, and a tile of the weight in registers."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from ..ops.nf4.reference import CODES


def decode_asm(code: tuple[float, ...]) -> str:
    """PTX that maps 4 bytes in $4 to float16 codes: high nibbles to $0 and $1, low nibbles to $2 and $3.

    A byte permute looks up four nibbles at once in a table of eight bytes: two of them and a selection by the nibble's
    top bit serve 16 entries. One such plane holds the low bytes of the codes, another the high ones.

    float16 rather than bfloat16 codes: they cost the same, and their rounding (2^-12) cannot add up over an input of
    one sign to more than what rounding the weight itself to bfloat16 costs (2^-9 would).
    """
    halves = struct.unpack("<16H", struct.pack("<16e", *code))
    planes = []
    for shift in (0, 8):
        octets = [(half >> shift) & 0xFF for half in halves]
        planes.append([int.from_bytes(bytes(octets[i : i + 4]), "little") for i in range(0, 16, 4)])
    lines = [
        "{ .reg .b32 q, s, u, v, lo, hi;",
        "shr.b32 s, $4, 1;",
        "and.b32 s, s, 0x44444444;",
        "or.b32 s, s, 0x32103210;",
        "and.b32 q, $4, 0x77777777;",
    ]
    for pair in (0, 1):
        if pair:
            lines += ["shr.b32 q, q, 16;", "shr.b32 s, s, 16;"]
        for plane, t in zip(("lo", "hi"), planes, strict=True):
            lines += [
                f"{{ .reg .b32 a, b; mov.b32 a, {t[0]:#x}; mov.b32 b, {t[1]:#x}; prmt.b32 u, a, b, q; }}",
                f"{{ .reg .b32 a, b; mov.b32 a, {t[2]:#x}; mov.b32 b, {t[3]:#x}; prmt.b32 v, a, b, q; }}",
                f"prmt.b32 {plane}, u, v, s;",
            ]
        lines += [f"prmt.b32 ${pair}, lo, hi, 0x7351;", f"prmt.b32 ${2 + pair}, lo, hi, 0x6240;"]
    return "\n".join([*lines, "}"])


NF4_ASM = tl.constexpr(decode_asm(CODES["nf4"]))


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
def load_weight_tile(
    packed_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, n0, k0, N, K, stride_wn, stride_sn,
    DTYPE: tl.constexpr, DECODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[n0 : n0 + BLOCK_N, k0 : k0 + BLOCK_K] as DTYPE, zero outside.

    DECODE "any" takes every shape element by element. "asm" and "lut" want K to be a multiple of BLOCKSIZE, so that
    rows are whole blocks; stride_wn is then the bytes and stride_sn the scales of a row. "asm" is NF4 to
    bfloat16 on NVIDIA.
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
        if DECODE == "asm":
            high, low = tl.inline_asm_elementwise(
                NF4_ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            byte = packed.to(tl.int32)
            high = tl.load(code_ptr + (byte >> 4))
            low = tl.load(code_ptr + (byte & 0xF))
        codes = tl.join(high, low).reshape(BLOCK_N, BLOCK_K).to(tl.float32)
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
