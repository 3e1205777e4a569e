"""Tiles of the adapter's own products, by what a product costs and by target."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...triton_common.launch import Target


class Tile(NamedTuple):
    """Rows and columns of a tile of x or dY, the most columns of the rank, and warps."""

    block_m: int
    block: int
    block_r: int
    num_warps: int = 4


# Six products a step in place of one or three need small tiles, or registers spill.
TILE, TILE_FLOAT32 = Tile(64, 128, 64), Tile(32, 64, 16)


def shrink_tile(pieces: int, m: int, on: Target) -> Tile:
    """The tile of the pass over x for S."""
    if pieces == 6:
        return Tile(64, 64, 16)
    # 128 rows are Blackwell's natural size; on H100 they take 41 microseconds where 64 take 38 (8192 x 4096)
    return TILE if m <= TILE.block_m or on.arch == 90 else Tile(128, 64, 64)


def dy_tile(pieces: int, rank: int, on: Target) -> Tile:
    """The tile of the pass over dY; its width divides the traffic of T's planes, its registers hold a part of dB.

    Set from compiled objects unless a row says so: the widest that spills nothing at any rank.
    """
    if pieces == 6:  # narrow: what tensor cores cut off adds up along a tile, and T must err no more than by FMA units
        return Tile(32, 32, 16)
    if on.kind == "hip":
        return TILE if pieces == 1 else Tile(64, 64, 64)
    if on.arch == 90 and rank <= 16:  # measured on H100: 136 microseconds (pieces 3: 167) for 144 (307) by eight warps
        return Tile(64, 256, 16, 4)
    if pieces == 1:
        return Tile(64, 256, 64, 8)
    return Tile(64, 128, 64 if on.arch in (90, 100) else 32, 8)


def da_tile(pieces: int, on: Target) -> Tile:
    """The tile of the pass over x."""
    if pieces == 6:
        return TILE_FLOAT32
    narrow = pieces == 3 and on.kind == "cuda" and on.arch not in (90, 100)  # three products spill beside wide sums
    return Tile(64, 128, 32) if narrow else TILE


def pieces(x: torch.Tensor, parameter: torch.Tensor) -> int:
    """How a product of x with float32 or parameter values keeps the parameter's accuracy; see `dot_wide`."""
    if x.dtype == parameter.dtype != torch.float32:
        return 1
    return 3 if x.dtype == torch.bfloat16 else 6


def stages(on: Target) -> int:
    """How many steps ahead loads run."""
    return 2 if on.kind == "hip" or on.arch == 120 else 3  # 64 KiB of shared memory; registers would spill


def options(pieces: int, tile_r: int, on: Target) -> dict[str, int]:
    """Three products of a wide tile take twice the warps where accumulators are ordinary registers."""
    wide = pieces == 3 and tile_r > 16 and on.kind == "cuda" and on.arch not in (90, 100)
    return {"num_warps": 8 if wide else 4, "num_stages": stages(on)}
