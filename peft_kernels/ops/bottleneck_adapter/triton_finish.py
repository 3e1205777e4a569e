"""The weight gradients, second half: the parts by rows added, every gradient finished in its own dtype."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...triton_common.launch import cdiv, launch
from ...triton_common.lowrank import block_r
from .triton_columns import Products


def finish(
    products: Products,
    weight: torch.Tensor,
    scale: float,
    *,
    factor: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    weighted: torch.Tensor | None = None,
    t_sums: torch.Tensor | None = None,
    offset_sums: torch.Tensor | None = None,
) -> None:
    """Fill what is given, with P = t^T f(v) (r, C), S = sums of f(v), T = sums of t and the weight W, both (r, C).

    out (r, C) = scale factor P + T offset, sums (C,) = scale factor S, weighted (C,) = scale (sum_r P W + bias S),
    t_sums (r,) = T, offset_sums (C,) = sum_r T W; factor, offset and bias (C,), which may be None.
    """
    splits, columns, rank = products.planes.shape
    block_c = 16
    strides: dict[str, Any] = {"stride_wr": weight.stride(0), "stride_wc": weight.stride(1)}
    strides |= dict(zip(("stride_ps", "stride_pc", "stride_pr"), products.planes.stride(), strict=True))
    strides |= {"stride_or": 0 if out is None else out.stride(0), "stride_oc": 0 if out is None else out.stride(1)}
    launch(
        _bottleneck_finish_kernel,
        (cdiv(columns, block_c),),
        weight.device,
        planes_ptr=products.planes,
        sums_ptr=products.sums,
        t_sums_ptr=products.t_sums,
        weight_ptr=weight,
        factor_ptr=factor,
        offset_ptr=offset,
        bias_ptr=bias,
        out_ptr=out,
        out_sums_ptr=sums,
        weighted_ptr=weighted,
        out_t_sums_ptr=t_sums,
        offset_sums_ptr=offset_sums,
        C=columns,
        rank=rank,
        splits=splits,
        scale=scale,
        **strides,
        BLOCK_C=block_c,
        BLOCK_R=block_r(rank),
        num_warps=4,
    )


@triton.jit
def _bottleneck_finish_kernel(
    planes_ptr, sums_ptr, t_sums_ptr, weight_ptr, factor_ptr, offset_ptr, bias_ptr, out_ptr, out_sums_ptr,
    weighted_ptr, out_t_sums_ptr, offset_sums_ptr, C, rank, splits, scale,
    stride_wr, stride_wc, stride_ps, stride_pc, stride_pr, stride_or, stride_oc,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """See `finish`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_in = c < C
    factor = tl.zeros([BLOCK_C], tl.float32) + scale
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr + c, mask=c_in, other=0.0).to(tl.float32)
    weighted, offset_sums = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if sums_ptr is not None:
        sums = tl.zeros([BLOCK_C], tl.float32)
        for split in range(splits):
            sums += tl.load(sums_ptr + split * C + c, mask=c_in, other=0.0)
        if out_sums_ptr is not None:
            tl.store(out_sums_ptr + c, (sums * factor).to(out_sums_ptr.dtype.element_ty), mask=c_in)
        if bias_ptr is not None:
            weighted += sums * tl.load(bias_ptr + c, mask=c_in, other=0.0).to(tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_in = r < rank
        inside = c_in[:, None] & r_in[None, :]
        products, t_sums = tl.zeros([BLOCK_C, BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
        planes = planes_ptr + c.to(tl.int64)[:, None] * stride_pc + r[None, :] * stride_pr
        for split in tl.range(0, splits, num_stages=3):
            products += tl.load(planes, mask=inside, other=0.0)
            if t_sums_ptr is not None:
                t_sums += tl.load(t_sums_ptr + split * rank + r, mask=r_in, other=0.0)
            planes += stride_ps
        if (weighted_ptr is not None) | (offset_sums_ptr is not None):
            w = tl.load(weight_ptr + c.to(tl.int64)[:, None] * stride_wc + r[None, :] * stride_wr, mask=inside,
                        other=0.0).to(tl.float32)  # fmt: skip
            weighted += tl.sum(products * w, 1)
            offset_sums += tl.sum(t_sums[None, :] * w, 1)
        if out_ptr is not None:
            result = products * factor[:, None]
            if offset_ptr is not None:
                result += t_sums[None, :] * tl.load(offset_ptr + c, mask=c_in, other=0.0).to(tl.float32)[:, None]
            to = out_ptr + c.to(tl.int64)[:, None] * stride_oc + r[None, :] * stride_or
            tl.store(to, result.to(out_ptr.dtype.element_ty), mask=inside)
        if out_t_sums_ptr is not None:
            total = t_sums.to(out_t_sums_ptr.dtype.element_ty)
            tl.store(out_t_sums_ptr + r, total, mask=r_in & (tl.program_id(0) == 0))
    if weighted_ptr is not None:
        tl.store(weighted_ptr + c, (weighted * scale).to(weighted_ptr.dtype.element_ty), mask=c_in)
    if offset_sums_ptr is not None:
        tl.store(offset_sums_ptr + c, offset_sums.to(offset_sums_ptr.dtype.element_ty), mask=c_in)
