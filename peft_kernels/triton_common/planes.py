"""Split reductions: partial results as float32 planes, summed in a fixed order so that two runs agree bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Target, cdiv, launch


def split_count(programs: int, steps: int, most: int, on: Target, resident: int = 2) -> int:
    """How often to split a loop of `steps` so that about `resident` programs per multiprocessor run."""
    return max(1, min(resident * on.multiprocessors // programs, steps, most))


def sum_planes(planes: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """out = scale * planes.sum(0), rounded to out's dtype; out is contiguous."""
    block = 1024
    launch(
        _sum_planes_kernel,
        (cdiv(out.numel(), block),),
        out.device,
        planes_ptr=planes,
        out_ptr=out,
        scale=scale,
        numel=out.numel(),
        planes=planes.shape[0],
        BLOCK=block,
        num_warps=4,
    )
    return out


@triton.jit
def _sum_planes_kernel(planes_ptr, out_ptr, scale, numel, planes, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(planes):
        acc += tl.load(planes_ptr + offset, mask=inside, other=0.0)
        planes_ptr += numel
    tl.store(out_ptr + offset, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)
