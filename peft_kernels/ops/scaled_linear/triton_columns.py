"""One pass over a matrix on the GPU: scale its columns, and sum them in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_common.launch import cdiv, launch, target
from ...triton_common.planes import part_sums, rows_at_once, split_count, sum_planes

# Bytes of a tile's column, and its columns: a warp reads one whole row of 16-bit elements, 16 bytes a thread. Measured
# on H100, M = 8192, before tiles were fetched ahead: sums of 4096 columns 51 us, by tiles of 128 columns 78; of 14336
# columns 130 and 245.
_COLUMN_BYTES, _BLOCK_N, _WARPS = 64, 256, 4
_STAGES = 3  # a tile is added while the next are on their way; what is only scaled is as fast as a copy without
_STEPS = 4  # at least, of a part of the rows: sums of many short parts round more often than those of long ones


def columns(
    u: torch.Tensor,
    *,
    times: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    sums: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One pass over u (M, N): out = u * scale, column sums of u, and of u * times, float32; what is asked for."""
    if out is None and not sums and times is None:
        return None, None
    m, n = u.shape
    block_m = _COLUMN_BYTES // u.element_size()
    programs, steps = cdiv(n, _BLOCK_N), cdiv(m, block_m)
    reduces = sums or times is not None
    on, most = target(u.device), cdiv(steps, _STEPS)
    rows = cdiv(steps, split_count(programs, steps, most, on) if reduces else steps) * block_m
    splits = cdiv(m, rows)
    wanted = (sums, times is not None)
    planes = [u.new_empty((splits, n), dtype=torch.float32) if want else None for want in wanted]
    launch(
        _column_pass_kernel,
        (programs, splits),
        u.device,
        u_ptr=u,
        v_ptr=times,
        scale_ptr=scale,
        out_ptr=out,
        sums_ptr=planes[0],
        products_ptr=planes[1],
        M=m,
        N=n,
        m_per_split=rows,
        stride_um=u.stride(0),
        stride_vm=0 if times is None else times.stride(0),
        stride_om=0 if out is None else out.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        ROWS=rows_at_once(block_m, _BLOCK_N, u.element_size(), _WARPS),
        STAGES=1 if not reduces else 2 if on.kind == "hip" else _STAGES,
        num_warps=_WARPS,
    )
    total, products = (None if p is None else p[0] if splits == 1 else sum_planes(p, p.new_empty(n)) for p in planes)
    return total, products


@triton.jit
def _column_pass_kernel(
    u_ptr, v_ptr, scale_ptr, out_ptr, sums_ptr, products_ptr, M, N, m_per_split, stride_um, stride_vm, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = u * scale (out may be u), sums[split] and products[split] (N,) over the split's part of the rows."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    products = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if out_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    for m0 in tl.range(split * m_per_split, tl.minimum(M, (split + 1) * m_per_split), BLOCK_M, num_stages=STAGES):
        row = (m0 + m).to(tl.int64)[:, None]
        inside = (m < M - m0)[:, None] & (n < N)[None, :]
        u = tl.load(u_ptr + row * stride_um + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            sums += part_sums(u, ROWS)
        if products_ptr is not None:
            v = tl.load(v_ptr + row * stride_vm + n[None, :], mask=inside, other=0.0).to(tl.float32)
            products += part_sums(u * v, ROWS)
        if out_ptr is not None:
            to = out_ptr + row * stride_om + n[None, :]
            tl.store(to, (u * scale[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
    offset = split.to(tl.int64) * N + n
    if sums_ptr is not None:
        tl.store(sums_ptr + offset, tl.sum(sums, 0), mask=n < N)
    if products_ptr is not None:
        tl.store(products_ptr + offset, tl.sum(products, 0), mask=n < N)
