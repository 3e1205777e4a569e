"""Which bottlenecks one program holds, how its products keep their accuracy, and its tiles."""

from __future__ import annotations

import torch

from ...triton_common.launch import Target, cdiv, power_of_two


def fused(rank: int, *counts: int) -> bool:
    """Whether a program's registers hold the hidden of its rows, or its gradient.

    At M = 8192, K = N = 4096, r = 256 the fused backward kernel with LayerNorm moves 270 MB; `triton_wide.rows` moves
    3 GB in some 15 passes over float32 matrices.
    """
    return rank <= (256 if max(counts) == 1 else 64)


def pieces(weight: torch.Tensor, other: torch.Tensor | None = None, exact: bool = False) -> int:
    """How a product with a weight keeps its accuracy; see `dot_wide`. exact: the other operand is a tensor as it is."""
    if weight.dtype != torch.float32:
        return 1
    return 3 if exact and other is not None and other.dtype == torch.bfloat16 else 6


def tile_for(m: int, rank: int, pieces: int, on: Target, backward: bool = False) -> dict[str, int]:
    """Set from compiled objects (no spills, shared memory), and for 16 bits on Hopper measured.

    H100, M = 8192, K = N = 4096, r = 64, bfloat16: forward 82 us, with layer norm 86 (by 32 x 256 tiles 80 and 137);
    backward over rows 80 and 106; a copy of x takes 50.
    """
    tile_r, stages = max(16, power_of_two(rank)), 2 if on.kind == "hip" else 3
    if pieces > 1:  # three or six products a step
        block_m, block, warps = 32, 16, 4
    elif on.arch == 90 and tile_r <= 64:
        block_m, block, warps, stages = (32, 128, 8, 4) if backward else (64, 128, 8, 5)
        while block_m > 16 and 2 * cdiv(m, block_m) < on.multiprocessors:
            block_m, warps = block_m // 2, 4
    elif not backward:
        block_m, block, warps = 64, 64 if tile_r <= 128 else 32, 4 if tile_r <= 64 else 8
    else:
        block_m, block, warps = 64, 32, 8
        if tile_r > (128 if on.arch in (100, 120) else 64) and on.kind != "hip" and on.arch != 90:  # 64 rows spill
            block_m, block = 32, 16 if tile_r > 128 and on.arch == 120 else 32
        elif tile_r > 128 and on.kind == "hip":  # with twice the registers a lane
            warps = 4
    return {
        "BLOCK_M": max(16, min(block_m, power_of_two(m))),
        "BLOCK": block,
        "BLOCK_R": min(tile_r, 64) if backward else tile_r,
        **({"RANKS": cdiv(rank, 64)} if backward else {}),
        "num_warps": warps,
        "num_stages": stages,
    }
