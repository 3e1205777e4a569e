"""The low-rank term that GEMMs take into their accumulator: what the host passes, and the kernel that adds it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .device import apply_dropout, lora_seed
from .launch import cdiv, launch, power_of_two, target


class LowRank(NamedTuple):
    """mask * (scaling * left right): S and B^T in the forward pass, T and A (scaling 1) in the backward one.

    left: (M, rank) float32, unit stride along the rank. right: (rank, columns), any strides, any dtype.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float = 1.0
    p: float = 0.0
    seed: torch.Tensor | None = None

    def arguments(self, out_dtype: torch.dtype) -> dict[str, Any]:
        """As kernel arguments, for a result of `out_dtype`."""
        float32 = out_dtype == torch.float32
        pieces = 6 if float32 else 1 if self.right.element_size() == 2 else 3
        rank = self.left.shape[1]
        return {
            "left_ptr": self.left,
            "right_ptr": self.right,
            "rank": rank,
            "scaling": self.scaling,
            "stride_lm": self.left.stride(0),
            "stride_rr": self.right.stride(0),
            "stride_rn": self.right.stride(1),
            "LORA_PIECES": pieces,
            "BLOCK_R": min(block_r(rank), {1: 64, 3: 32, 6: 16}[pieces]),  # several products a step
            **dropout_arguments(self.p, self.seed),
        }


# The arguments of a kernel that gets no low-rank term.
NO_LOW_RANK: dict[str, Any] = {
    "left_ptr": None, "right_ptr": None, "rank": 0, "scaling": 0.0, "stride_lm": 0, "stride_rr": 0, "stride_rn": 0,
    "LORA_PIECES": 1, "BLOCK_R": 16, "seed_ptr": None, "threshold": 0, "inverse_keep": 1.0, "DROPOUT": False,
}  # fmt: skip


def block_r(rank: int) -> int:
    """Columns of a rank tile: at least the 16 that a tensor-core product takes, at most 64 at a time."""
    return min(max(power_of_two(rank), 16), 64)


def dropout_arguments(p: float, seed: torch.Tensor | None) -> dict[str, Any]:
    """Seed, 32-bit threshold and 1 / (1 - p); that is zero for p = 1, where one word in 2^32 passes the threshold."""
    return {
        "seed_ptr": seed if p > 0 else None,
        "threshold": min(int(p * 2**32), 2**32 - 1),
        "inverse_keep": 1 / (1 - p) if p < 1 else 0.0,
        "DROPOUT": p > 0,
    }


def expand(out: torch.Tensor, terms: Sequence[LowRank], bias: torch.Tensor | None = None) -> torch.Tensor:
    """out (M, N) = bias + the terms: what a GEMM that adds to `out` starts from."""
    for i, term in enumerate(terms):
        _expand(out, term, None if i else bias, add=i > 0)
    return out


def expand_add(out: torch.Tensor, term: LowRank) -> None:
    """out (M, N) += term, rounded once."""
    _expand(out, term, None, add=True)


def _expand(out: torch.Tensor, term: LowRank, bias: torch.Tensor | None, add: bool) -> None:
    m, n = out.shape
    block_m, block_n = 64, 64 if out.dtype == torch.float32 else 128
    arguments = term.arguments(out.dtype)
    wide = arguments["LORA_PIECES"] == 3 and arguments["BLOCK_R"] > 16  # four warps would spill
    launch(
        _lora_expand_kernel,
        (cdiv(n, block_n), cdiv(m, block_m)),
        out.device,
        out_ptr=out,
        bias_ptr=bias,
        M=m,
        N=n,
        stride_om=out.stride(0),
        **arguments,
        HAS_BIAS=bias is not None,
        ADD=add,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8 if wide and target(out.device).kind == "cuda" else 4,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["threshold"])
def _lora_expand_kernel(
    out_ptr, left_ptr, right_ptr, seed_ptr, bias_ptr, M, N, rank, scaling, threshold, inverse_keep,
    stride_om, stride_lm, stride_rr, stride_rn,
    LORA_PIECES: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = bias + mask * (scaling * left right), or with ADD out += it."""
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    delta = lora_seed(
        left_ptr, right_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), m0, n0, M, N, rank,
        stride_lm, 1, stride_rn, stride_rr, LORA_PIECES, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    delta *= scaling
    if DROPOUT:
        delta = apply_dropout(delta, seed_ptr, threshold, inverse_keep, m0, n0, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptr += m.to(tl.int64)[:, None] * stride_om + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        delta += tl.load(out_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr, delta.to(out_ptr.dtype.element_ty), mask=inside)
