"""`linear_4bit` on the GPU: fused kernels for few rows, one decode into a scratch and the vendor's GEMM for many."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...triton_common import why_not_tensors
from ...triton_common.decode import CODE_KINDS
from ...triton_common.launch import Target, cdiv, launch, target
from ...triton_common.lowrank import NO_LOW_RANK, LowRank
from ...triton_common.planes import split_count, sum_planes
from ...weight4bit import Weight4bit
from ..nf4.triton_kernels import statistics
from .native_calls import row_major
from .triton_gemm import _linear_4bit_bwd_kernel, _linear_4bit_fwd_kernel
from .triton_vendor import vendor_backward, vendor_forward

# The most rows that the fused kernels serve, by the instructions of their tiles; beyond, decode to scratch and the
# vendor's GEMM. wgmma: measured on H100; 128 rows of 14336 x 4096 take 62 microseconds forward for 106, backward 65 for
# 115; of 192 both take 105. The others are guesses from instructions per weight: tensor cores that outrun the decode
# (tcgen05), and decodes that cost two or three times as much (mma.sync, tables), give way earlier.
_CROSSOVER = {"wgmma": 128, "tcgen05": 64, "mma": 128, "table": 64}
# wgmma's tiles of more rows are few, and of a smaller weight too few for the multiprocessors (4096 x 4096: 58 for 34).
_WGMMA_SMALL_ROWS, _WGMMA_SMALL = 64, 1 << 25


class _Tile(NamedTuple):
    """A tile of the fused kernels: BLOCK_M rows of x; BLOCK_N x BLOCK_K of the weight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Forward and backward tiles, by the most rows each serves: wgmma's measured on H100, 14336 x 4096; the others set from
# compiled objects (registers, spills, instructions per weight). Forward, up to eight rows take mma.sync everywhere: its
# product has eight columns where wgmma's and tcgen05's have sixteen, and half of those would be scaled for nothing.
# wgmma takes 128 rows of x where mma.sync would spill; tcgen05 loses the product from there on, and with a mask 256
# columns wide (Triton 3.6).
_TILES = {
    "wgmma": (
        {8: _Tile(8, 128, 128, 4, 4), 16: _Tile(16, 128, 64, 4, 4), 32: _Tile(32, 128, 64, 4, 4),
         64: _Tile(64, 64, 128, 4, 3), 128: _Tile(128, 256, 64, 8, 4), 512: _Tile(128, 128, 64, 4, 3)},
        {16: _Tile(16, 128, 128, 4, 3), 64: _Tile(64, 128, 128, 8, 3), 512: _Tile(128, 64, 128, 8, 3)},
    ),
    "tcgen05": (
        {8: _Tile(8, 128, 128, 4, 4), 16: _Tile(16, 128, 128, 4, 4), 32: _Tile(32, 128, 128, 4, 3),
         512: _Tile(64, 256, 64, 8, 3)},
        {16: _Tile(16, 64, 256, 4, 3), 32: _Tile(32, 64, 256, 4, 3), 512: _Tile(64, 64, 128, 8, 3)},
    ),
    "mma": (
        {8: _Tile(8, 128, 128, 4, 3), 16: _Tile(16, 128, 128, 4, 3), 32: _Tile(32, 256, 64, 4, 3),
         512: _Tile(64, 256, 64, 8, 3)},
        {16: _Tile(16, 64, 256, 4, 3), 32: _Tile(32, 64, 256, 4, 3), 512: _Tile(64, 64, 256, 8, 3)},
    ),
    "table": (  # one scale a row of the tile; two stages fit into 64 KiB
        {16: _Tile(16, 128, 64, 4, 2), 32: _Tile(32, 128, 64, 4, 2), 64: _Tile(64, 128, 64, 8, 2),
         512: _Tile(128, 128, 64, 8, 2)},
        {16: _Tile(16, 64, 64, 4, 2), 32: _Tile(32, 64, 64, 4, 2), 512: _Tile(64, 64, 64, 4, 2)},
    ),
}  # fmt: skip
_INSTRUCTIONS: dict[int | str, str] = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


def forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K), M >= 1 -> (M, N)."""
    x = row_major(x)
    return fused_forward(x, weight, bias, None) if fused(x, weight) else vendor_forward(x, weight, bias)


def backward(dy: torch.Tensor, weight: Weight4bit) -> torch.Tensor:
    """dy (M, N) -> dx (M, K)."""
    dy = row_major(dy)
    return fused_backward(dy, weight, None) if fused(dy, weight) else vendor_backward(dy, weight)


def fused(x: torch.Tensor, weight: Weight4bit) -> bool:
    """Whether the fused kernels run: float32 has no tensor cores worth decoding for."""
    tiles, (n, k) = _tiles(weight, target(x.device)), weight.shape
    most = _WGMMA_SMALL_ROWS if tiles == "wgmma" and n * k < _WGMMA_SMALL else _CROSSOVER[tiles]
    return x.dtype != torch.float32 and x.shape[0] <= most


def fused_forward(
    x: torch.Tensor,
    weight: Weight4bit,
    bias: torch.Tensor | None,
    term: LowRank | None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (M, N) = x W^T + b + term, where term.right is (rank, N); times out_scale (N,) float32 if given."""
    m, n = x.shape[0], weight.shape[0]
    on = target(x.device)
    tile = tile_for(0, m, weight, on)
    tiles, k_per_split, splits = split_of(m, weight, tile, on)
    y = x.new_empty((m, n))
    planes = y if splits == 1 else x.new_empty((splits, m, n), dtype=torch.float32)
    arguments = NO_LOW_RANK if term is None else term.arguments(x.dtype)
    launch(
        _linear_4bit_fwd_kernel,
        (tiles, cdiv(m, tile.block_m), splits),
        x.device,
        x_ptr=x,
        bias_ptr=bias,
        out_scale_ptr=out_scale,
        out_ptr=planes,
        k_per_split=k_per_split,
        stride_xm=x.stride(0),
        **{name: arguments[name] for name in arguments.keys() - _DROPOUT_ARGUMENTS},
        **weight_arguments(weight, x.dtype, on),
        HAS_BIAS=bias is not None,
        HAS_LORA=term is not None,
        K_WIDTH=k_width(tile, weight, on),
        M=m,
        **tile_arguments(tile, weight, on),
    )
    return y if splits == 1 else sum_planes(planes, y)


def split_of(m: int, weight: Weight4bit, tile: _Tile, on: Target) -> tuple[int, int, int]:
    """(tiles of N, columns of K for each split, splits) of the forward kernel."""
    n, k = weight.shape
    tiles, steps = cdiv(n, tile.block_n), cdiv(k, tile.block_k)
    # planes are written and read once each: their traffic stays below the weight's
    count = split_count(tiles * cdiv(m, tile.block_m), steps, k // (16 * m), on)
    k_per_split = cdiv(steps, count) * tile.block_k
    return tiles, k_per_split, cdiv(k, k_per_split)


def fused_backward(dy: torch.Tensor, weight: Weight4bit, term: LowRank | None) -> torch.Tensor:
    """dx (M, K) = dy W + term, where term.right is (rank, K)."""
    m, (n, k) = dy.shape[0], weight.shape
    on = target(dy.device)
    tile = tile_for(1, m, weight, on)
    grid = (cdiv(k, tile.block_k), cdiv(m, tile.block_m))
    steps = cdiv(n, tile.block_n)
    n_per_split = cdiv(steps, split_count(grid[0] * grid[1], steps, n // (16 * m), on)) * tile.block_n
    splits = cdiv(n, n_per_split)
    dx = dy.new_empty((m, k))
    planes = dx if splits == 1 else dy.new_empty((splits, m, k), dtype=torch.float32)
    launch(
        _linear_4bit_bwd_kernel,
        (*grid, splits),
        dy.device,
        dy_ptr=dy,
        out_ptr=planes,
        n_per_split=n_per_split,
        stride_ym=dy.stride(0),
        **(NO_LOW_RANK if term is None else term.arguments(dy.dtype)),
        **weight_arguments(weight, dy.dtype, on),
        HAS_LORA=term is not None,
        M=m,
        **tile_arguments(tile, weight, on),
    )
    return dx if splits == 1 else sum_planes(planes, dx)


_DROPOUT_ARGUMENTS = {"seed_ptr", "threshold", "inverse_keep", "DROPOUT"}


def words(weight: Weight4bit, on: Target) -> bool:
    """Whether tiles are decoded word by word; see `triton_words`."""
    return _decode_kind(weight, on) == "words"


def _decode_kind(weight: Weight4bit, on: Target) -> str:
    """How a tile is decoded: words of eight codes by byte permute on NVIDIA; else see `load_weight_tile`."""
    if weight.shape[1] % weight.blocksize:
        return "any"
    # the interpreter stands in for NVIDIA, with a table in the permute's place
    return "words" if on.kind != "hip" and weight.blocksize >= 64 and weight.packed.data_ptr() % 4 == 0 else "lut"


def weight_arguments(weight: Weight4bit, dtype: torch.dtype, on: Target) -> dict[str, Any]:
    n, k = weight.shape
    return {
        **statistics(weight),
        "N": n,
        "K": k,
        "stride_wn": k // 2,
        "stride_sn": k // weight.blocksize,
        "DECODE": _decode_kind(weight, on),
        "CODE": CODE_KINDS.index((weight.quant_type, dtype)),
        "enable_fp_fusion": False,
    }


def _one_absmax2(weight: Weight4bit, block_k: int) -> bool:
    """Whether the blocks of a row's block_k columns have one second-level scale in common, wherever a tile begins."""
    if weight.nested is None or weight.blocksize >= block_k:
        return True
    blocks = block_k // weight.blocksize
    return weight.shape[1] // weight.blocksize % blocks == 0 and weight.nested.blocksize % blocks == 0


def _tiles(weight: Weight4bit, on: Target) -> str:
    """Which tiles serve: those of the target's matrix instruction, or of a decode by table."""
    return _INSTRUCTIONS.get(on.arch, "mma") if _decode_kind(weight, on) == "words" else "table"


def tile_for(direction: int, m: int, weight: Weight4bit, on: Target) -> _Tile:
    """The tile for m rows, forward (0) or backward (1)."""
    table = _TILES[_tiles(weight, on)][direction]
    return next((tile for rows, tile in table.items() if m <= rows), table[max(table)])


def k_width(tile: _Tile, weight: Weight4bit, on: Target) -> int:
    """How many neighbouring slots of a product a thread's operand has; see `columns_of_slots`."""
    return 4 if tile.block_m < 16 or _tiles(weight, on) == "mma" else 2


def tile_arguments(tile: _Tile, weight: Weight4bit, on: Target) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "ABSMAX2": 1 if _one_absmax2(weight, tile.block_k) else tile.block_k // 64,
        "WHOLE_TILES": weight.shape[0] % tile.block_n == 0 and weight.shape[1] % tile.block_k == 0,
        "num_warps": tile.num_warps,
        # element by element it would stage a scale for each
        "num_stages": 1 if _decode_kind(weight, on) == "any" else tile.num_stages,
    }
