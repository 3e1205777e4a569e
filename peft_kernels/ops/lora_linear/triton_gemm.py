"""Dense GEMM whose accumulator starts from the adapters' low-rank term, so that the result is written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...triton_common.device import apply_dropout, dot, lora_seed
from ...triton_common.launch import Target, cdiv, launch, target
from ...triton_common.lowrank import LowRank

# Tiles by target: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. Set from compiled objects, not measured: two
# warpgroups of wgmma on Hopper, half the tile where accumulators are ordinary registers.
_TILES = {
    ("cuda", 80): (128, 128, 32, 8, 4),
    ("cuda", 86): (128, 128, 32, 8, 4),
    ("cuda", 89): (128, 128, 32, 8, 4),
    ("cuda", 90): (128, 256, 64, 8, 3),
    ("cuda", 100): (128, 256, 64, 8, 3),
    ("cuda", 120): (128, 128, 32, 8, 4),
    ("hip", "gfx942"): (128, 128, 32, 4, 2),
    ("hip", "gfx950"): (128, 128, 64, 4, 2),
}
_SAFE_TILE = (64, 64, 32, 4, 2)


def seeded_gemm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, term: LowRank) -> torch.Tensor:
    """x (M, K) w (K, N; any strides) + bias + term, rounded once."""
    m, k = x.shape
    n = w.shape[1]
    out = x.new_empty((m, n))
    block_m, block_n, block_k, num_warps, num_stages = _tile(target(x.device))
    if term.right.element_size() == 4:
        block_n = min(block_n, 128)  # the seed's pairs of bfloat16 would not leave enough registers
    launch(
        _lora_linear_gemm_kernel,
        (cdiv(m, block_m) * cdiv(n, block_n),),
        x.device,
        x_ptr=x,
        w_ptr=w,
        bias_ptr=bias,
        out_ptr=out,
        M=m,
        N=n,
        K=k,
        stride_xm=x.stride(0),
        stride_wk=w.stride(0),
        stride_wn=w.stride(1),
        **term.arguments(x.dtype),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _tile(on: Target) -> tuple[Any, ...]:
    return _TILES.get((on.kind, on.arch), _SAFE_TILE)


@triton.jit(do_not_specialize=["threshold"])
def _lora_linear_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, left_ptr, right_ptr, seed_ptr, out_ptr,
    M, N, K, rank, scaling, threshold, inverse_keep,
    stride_xm, stride_wk, stride_wn, stride_lm, stride_rr, stride_rn,
    HAS_BIAS: tl.constexpr, LORA_PIECES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = 8  # neighbouring programs share columns of w in L2
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    m0 = (first + program % (GROUP * tiles_n) % rows) * BLOCK_M
    n0 = program % (GROUP * tiles_n) // rows * BLOCK_N
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = lora_seed(
        left_ptr, right_ptr, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), m0, n0, M, N, rank,
        stride_lm, 1, stride_rn, stride_rr, LORA_PIECES, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    acc *= scaling
    if DROPOUT:
        acc = apply_dropout(acc, seed_ptr, threshold, inverse_keep, m0, n0, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]

    x_ptr += m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    w_ptr += k[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    for k0 in range(0, K, BLOCK_K):
        k_in = k < K - k0
        x = tl.load(x_ptr, mask=(m < M)[:, None] & k_in[None, :], other=0.0)
        w = tl.load(w_ptr, mask=k_in[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(x, w, acc)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K * stride_wk
    out_ptr += m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
