"""Heuristics: where torch's own operations serve a scaled, biased layer best, by named rows with their measurements.

Forward + backward in bf16 on two cores with AVX512-BF16, single calls of layers in turn, torch's time / ours. Over a
dense weight both make the vendor's two products (those that linear_4bit/native_vendor.py does not widen). So what is
left is the passes beside them, and the steps on the host: these take three times as long as in a loop of their own,
because a product evicts their code from the caches.
"""

from __future__ import annotations

import torch

from ... import native
from ...weight4bit import Weight4bit
from ..linear_4bit import native_vendor

# 192x576, 576x576, 576x1536 at M = 256: 0.73, 0.79, 0.88. torch's sum of dY takes 10 us, as ours does.
BIAS_OF_DENSE = (
    "bias of dense: torch's own linear layer makes the same two products and the same sum, and saves no x either, "
    "with fewer steps on the host"
)
# M x N, or M x K where the input is scaled. Scale and bias: 49 k 0.89, 98 k 0.95, 147 k 0.96, 393 k 1.01, 590 k 1.19,
# 1573 k 1.35; IA3's output: 49 k 0.97, 147 k 1.01, 590 k 1.06; its input: 98 k 0.95, 147 k 0.99, 393 k 1.03,
# 590 k 1.04, 1573 k 1.36. In a whole model a step of Python takes longer still: SmolLM2 in float32 on a Skylake server,
# scale and bias, 393 k: forward 2.5 ms and 2.9.
SMALL_BESIDE_DENSE = (
    "small beside dense: where fewer than 2^19 elements, rows x features, are scaled beside a dense product, torch's "
    "passes take less than the steps on the host around a fused one; more rows run on the kernel"
)
_SMALL = 1 << 19

_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has only the latter


def why_vendor(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: object,
    is_feedforward: bool,
) -> str | None:
    """The row that leaves this call to torch, or None; a bias of another dtype would be rounded to x's there.

    scale: None where there is none to train; else it is not looked at.
    """
    if not (x.is_cpu and isinstance(weight, torch.Tensor)) or (bias is not None and bias.dtype is not x.dtype):
        return None
    if _exporting():  # a program for any number of rows must not depend on this one
        return BIAS_OF_DENSE if scale is None and native.multiplies(x.dtype) else None
    n, k = weight.shape
    if native_vendor.widens(x.dtype, x.numel() // max(k, 1)):
        return None  # torch's product is the slow one
    if scale is None:
        return BIAS_OF_DENSE
    elements = x.numel() if is_feedforward or k == 0 else x.numel() // k * n
    return SMALL_BESIDE_DENSE if elements < _SMALL else None
