"""The calls that are compiled ahead of time for the codec."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...triton_common.aot import Case
from ...weight4bit import Nested, Weight4bit
from .triton_kernels import dequantize, quantize


def meta_weight(
    n: int, k: int, *, nested: bool = True, quant_type: str = "nf4", blocksize: int = 64, layout: str = "bnb"
) -> Weight4bit:
    """A Weight4bit without storage."""
    blocks = -(-n * k // blocksize)
    packed = torch.empty(n * k // 2, dtype=torch.uint8)
    absmax, statistics = torch.empty(blocks), None
    if nested:
        statistics = Nested(torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(()), 256)
        absmax = torch.empty(blocks, dtype=torch.uint8)
    return Weight4bit(packed, absmax, statistics, (n, k), torch.bfloat16, blocksize, quant_type, layout)


def cases() -> Iterator[Case]:
    """Both directions, with and without double quantization, whole and a window of columns."""
    yield Case("quantize bf16", 0, lambda: quantize(torch.empty(4096 * 4096, dtype=torch.bfloat16), 64, "nf4"))
    yield Case("dequantize bf16 nested", 0, lambda: dequantize(meta_weight(4096, 4096), torch.bfloat16))
    yield Case("dequantize bf16", 0, lambda: dequantize(meta_weight(4096, 4096, nested=False), torch.bfloat16))
    yield Case("dequantize fp32 nested", 0, lambda: dequantize(meta_weight(4096, 4096), torch.float32))
    columns = slice(0, 2048)
    yield Case(
        "dequantize bf16 columns", 0, lambda: dequantize(meta_weight(4096, 4096), torch.bfloat16, columns=columns)
    )
    yield Case("dequantize bf16 tiled", 0, lambda: dequantize(meta_weight(4096, 4096, layout="tiled"), torch.bfloat16))
    yield Case("dequantize bf16 rows apart", 0, lambda: _apart(4096, 4096))


def _apart(n: int, k: int) -> None:
    out = torch.empty((n, k + 16), dtype=torch.bfloat16)[:, :k]
    dequantize(meta_weight(n, k), torch.bfloat16, out)
