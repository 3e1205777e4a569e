"""`prompt_embedding` on the GPU: one copy kernel forward, one sum over rows backward for each gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...triton_common import why_not_tensors
from ...triton_common.launch import cdiv, launch, power_of_two

_BLOCK = 1024  # columns of a program: 16 bytes a thread for 16-bit rows with four warps


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


def _block(hidden: int) -> int:
    return min(_BLOCK, power_of_two(hidden))


def forward(input_ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, out: torch.Tensor) -> None:
    """out (B, P + L, hidden) = [prompt; E[ids]]."""
    batch, rows, hidden = out.shape
    block = _block(hidden)
    launch(
        _prompt_embedding_fwd_kernel,
        (batch * rows, cdiv(hidden, block)),
        out.device,
        ids_ptr=input_ids,
        weight_ptr=weight,
        prompt_ptr=prompt,
        out_ptr=out,
        tokens=prompt.shape[0],
        length=input_ids.shape[1],
        hidden=hidden,
        stride_wv=weight.stride(0),
        stride_pp=prompt.stride(0),
        BLOCK=block,
        num_warps=4,
    )


def _gradient_rows(dy: torch.Tensor) -> dict[str, Any]:
    """The arguments by which both backward kernels take dy (B, rows, hidden)."""
    strides = {"stride_db": dy.stride(0), "stride_dt": dy.stride(1)}
    return {"dy_ptr": dy, "hidden": dy.shape[2], **strides, "BLOCK": _block(dy.shape[2]), "num_warps": 4}


def dprompt(dy: torch.Tensor, out: torch.Tensor) -> None:
    """out (P, hidden) = the sum over the batch of the first P rows of dy (B, P + L, hidden)."""
    launch(
        _prompt_embedding_dprompt_kernel,
        (out.shape[0], cdiv(out.shape[1], _block(out.shape[1]))),
        out.device,
        out_ptr=out,
        batch=dy.shape[0],
        **_gradient_rows(dy),
    )


def dweight(dy: torch.Tensor, ids: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """Rows ids of out (V, hidden), which is zero elsewhere = the sums of the rows of dy (B, L, hidden) in `order`."""
    launch(
        _prompt_embedding_dweight_kernel,
        (ids.numel(), cdiv(out.shape[1], _block(out.shape[1]))),
        out.device,
        ids_ptr=ids,
        order_ptr=order,
        out_ptr=out,
        count=ids.numel(),
        length=dy.shape[1],
        **_gradient_rows(dy),
    )


@triton.jit
def _prompt_embedding_fwd_kernel(
    ids_ptr, weight_ptr, prompt_ptr, out_ptr, tokens, length, hidden, stride_wv, stride_pp, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row % (tokens + length)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    out_ptr += row * hidden + column
    if at < tokens:
        values = tl.load(prompt_ptr + at * stride_pp + column, mask=inside)
        tl.store(out_ptr, values.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        token = tl.load(ids_ptr + row // (tokens + length) * length + at - tokens)
        tl.store(out_ptr, tl.load(weight_ptr + token * stride_wv + column, mask=inside), mask=inside)


@triton.jit
def _prompt_embedding_dprompt_kernel(dy_ptr, out_ptr, batch, hidden, stride_db, stride_dt, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    dy_ptr += token * stride_dt + column
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(batch):
        total += tl.load(dy_ptr, mask=inside, other=0.0).to(tl.float32)
        dy_ptr += stride_db
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _prompt_embedding_dweight_kernel(
    dy_ptr, ids_ptr, order_ptr, out_ptr, count, length, hidden, stride_db, stride_dt, BLOCK: tl.constexpr
):  # fmt: skip
    """The program at the first place of an id sums over all its places; the others have nothing to do."""
    first = tl.program_id(0)
    token = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    if token != before:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < hidden
        total = tl.zeros([BLOCK], tl.float32)
        at = first
        same = token
        while same == token:
            row = tl.load(order_ptr + at)
            pointer = dy_ptr + row // length * stride_db + row % length * stride_dt + column
            total += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
            at += 1
            same = tl.load(ids_ptr + at, mask=at < count, other=-1)
        tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)
