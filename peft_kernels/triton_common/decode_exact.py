"""4-bit codes to 16-bit weights that equal bitsandbytes' bit for bit: a table of 16 rounded products for each scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops.nf4.reference import CODES

_CONVERT = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


def exact_asm(quant_type: str, dtype: torch.dtype, tiled: bool = False) -> str:
    """PTX that maps words $16 ... $19 of eight codes, which share the scale $20, to pairs of weights.

    $(4 i + j) is pair i of word j, as the weight has them; tiled: the high nibbles of two neighbouring bytes, then
    their low ones. A scale's 16 products are rounded once, as the definition
    says, and kept as two planes of bytes; a byte permute then looks up four nibbles at once. A scale costs 32
    instructions and a word 21, where a product and a conversion for each weight would take another 12.
    """
    halves = range(0, 16, 2)
    lines = [
        "{ .reg .b32 q, s, u, v, low, high;",
        ".reg .f32 even, odd;",
        *(f".reg .b32 t{i};" for i in halves),
        *(f".reg .b32 {plane}{i};" for plane in ("low", "high") for i in range(4)),
    ]
    for i in halves:
        lines += [
            f"mul.rn.f32 even, $20, {_float(CODES[quant_type][i])};",
            f"mul.rn.f32 odd, $20, {_float(CODES[quant_type][i + 1])};",
            f"cvt.rn.{_CONVERT[dtype]}.f32 t{i}, odd, even;",
        ]
    for plane, selector in (("low", "0x6420"), ("high", "0x7531")):
        lines += [f"prmt.b32 {plane}{i}, t{4 * i}, t{4 * i + 2}, {selector};" for i in range(4)]
    for word in range(4):
        lines += [
            f"shr.b32 s, ${16 + word}, 1;",
            "lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;",  # (s & 0x44444444) | 0x32103210
            f"and.b32 q, ${16 + word}, 0x77777777;",
        ]
        for half in (0, 2):
            lines += ["shr.b32 q, q, 16;", "shr.b32 s, s, 16;"] if half else []
            for plane in ("low", "high"):
                lines += [
                    f"prmt.b32 u, {plane}0, {plane}1, q;",
                    f"prmt.b32 v, {plane}2, {plane}3, q;",
                    f"prmt.b32 {plane}, u, v, s;",
                ]
            # a byte's high nibble comes first
            for i, selector in enumerate(("0x7351", "0x6240") if tiled else ("0x4051", "0x6273")):
                lines.append(f"prmt.b32 ${4 * (half + i) + word}, low, high, {selector};")
    return "\n".join([*lines, "}"])


def _float(value: float) -> str:
    return f"0f{int(torch.tensor(value).view(torch.int32)) & 0xFFFFFFFF:08X}"


# What kernels take as EXACT: an index into this list.
EXACT_KINDS = [(quant_type, dtype) for quant_type in CODES for dtype in _CONVERT]
# A kind's in bitsandbytes' layout at 2 EXACT, in the tiled one at 2 EXACT + 1.
_ASM = tl.constexpr(tuple(exact_asm(*kind, bool(i)) for kind in EXACT_KINDS for i in (0, 1)))


@triton.jit
def decode_exact(words, scale, EXACT: tl.constexpr, TILED: tl.constexpr):
    """[N, W] words and the scale of each -> [N, 4 W] pairs of 16-bit weights, each in an int32 (NVIDIA only).

    Every four neighbouring words share their scale.
    """
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    # 16 results of four words come early: none may overwrite a word that is still to be read
    p0, p1, p2, p3 = tl.inline_asm_elementwise(
        _ASM[2 * EXACT + TILED], "=&r," * 16 + "r,r,r,r,f,f,f,f", [words, scale], (tl.int32,) * 4, is_pure=True, pack=4
    )
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(N, 4 * W)
    if TILED:  # thread, c, half -> half, c, thread; see `ops.nf4.layout`
        pairs = pairs.reshape(N, W // 8, 4, 4, 2).permute(0, 1, 4, 3, 2).reshape(N, 4 * W)
    return pairs
