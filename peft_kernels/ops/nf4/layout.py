"""The two orders in which a 4-bit weight's codes may lie: bitsandbytes' and the tiled one, of the same size.

Tiled, the 32 bytes of every 64 weights hold them as a tensor core's operand takes them: byte 8 t + 2 c + e has weight
8 c + 2 t + e in its high nibble and weight 32 + 8 c + 2 t + e in its low one (t, c = 0 ... 3, e = 0, 1). In a 16-bit
m x 16 operand, thread t of four holds columns 2 t, 2 t + 1 of every group of eight: its share of a row's 64 weights is
one 8-byte word, and each byte permute of two neighbouring bytes yields whole registers (columns 2 t and 2 t + 1).
"""

from __future__ import annotations

import torch

LAYOUTS = ("bnb", "tiled")
TILE = 64  # weights that change places among each other
_CHUNK = 1 << 22  # bytes laid out anew at a time, so that the temporaries stay small beside the weight


def tile(packed: torch.Tensor) -> torch.Tensor:
    """(n,) uint8 in bitsandbytes' order -> the same codes in the tiled one; n is a multiple of 32."""
    return _by_chunks(packed, _tile)


def untile(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `tile`."""
    return _by_chunks(packed, _untile)


def _tile(packed: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1)
    half, c, t, e = 1, 2, 3, 4
    codes = codes.view(-1, 2, 4, 4, 2).permute(0, t, c, e, half)
    return ((codes[..., 0] << 4) | codes[..., 1]).reshape(-1)


def _untile(packed: torch.Tensor) -> torch.Tensor:
    t, c, e, half = 1, 2, 3, 4
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).view(-1, 4, 4, 2, 2).permute(0, half, c, t, e)
    return ((codes[..., 0] << 4) | codes[..., 1]).reshape(-1)


def _by_chunks(packed: torch.Tensor, change: object) -> torch.Tensor:
    out = torch.empty_like(packed, memory_format=torch.contiguous_format)
    for old, new in zip(packed.split(_CHUNK), out.split(_CHUNK), strict=True):
        new.copy_(change(old))  # type: ignore[operator]
    return out
