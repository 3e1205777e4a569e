"""Split reductions: partial results as float32 planes, summed in a fixed order so that two runs agree bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Target, cdiv, launch, power_of_two


def split_count(programs: int, steps: int, most: int, on: Target) -> int:
    """How often to split a loop of `steps` so that about two programs per multiprocessor run.

    With four, what took from 15 to 160 microseconds on H100 took as long or up to a tenth longer.
    """
    return max(1, min(2 * on.multiprocessors // programs, steps, most))


def sum_planes(planes: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """out = scale * planes.sum(0), rounded to out's dtype; out is contiguous."""
    numel, count = out.numel(), planes.shape[0]
    block = 256 if numel < 1 << 20 else 1024  # small results take more programs to read planes at the memory's speed
    launch(
        _sum_planes_kernel,
        (cdiv(numel, block),),
        out.device,
        planes_ptr=planes,
        out_ptr=out,
        scale=scale,
        numel=numel,
        planes=count,
        PLANES=min(8, power_of_two(count)),
        BLOCK=block,
        num_warps=4,
    )
    return out


@triton.jit
def _sum_planes_kernel(planes_ptr, out_ptr, scale, numel, planes, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """PLANES planes are on their way at a time: one after the other, each would wait for memory."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.arange(0, PLANES)[:, None]
    inside = offset < numel
    planes_ptr += plane.to(tl.int64) * numel + offset[None, :]
    acc = tl.zeros([PLANES, BLOCK], tl.float32)
    for first in range(0, planes, PLANES):
        acc += tl.load(planes_ptr, mask=(first + plane < planes) & inside[None, :], other=0.0)
        planes_ptr += tl.cast(numel, tl.int64) * PLANES
    tl.store(out_ptr + offset, (tl.sum(acc, 0) * scale).to(out_ptr.dtype.element_ty), mask=inside)


def rows_at_once(block_m: int, columns: int, element_size: int, num_warps: int) -> int:
    """Rows of a tile that all threads read at once, 16 bytes each: what `part_sums` keeps apart."""
    return max(1, min(block_m, 512 * num_warps // (columns * element_size)))


@triton.jit
def part_sums(x, ROWS: tl.constexpr):
    """Sums over every ROWS-th row of a tile: a thread adds its own rows, none waits for another."""
    return tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1]]), 0)
