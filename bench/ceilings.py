"""The measured ceilings of a machine: what memory and the vendor's matrix product reach. Floors are made from them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .case import dtype_name
from .peers import dense
from .timing import QUICK, Effort, measure

_BYTES = {"cpu": 32 << 20, "gpu": 2 << 30}  # of one call
_GEMM = {"cpu": (1024, 4096, 4096), "gpu": (8192, 8192, 8192)}  # rows, out_features, in_features


@functools.cache
def of(device: torch.device, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
    """bytes_per_second of a streaming read (GPU: a copy, read plus written), flops_per_second of a linear layer."""
    kind = "cpu" if device.type == "cpu" else "gpu"
    nbytes, (m, n, k) = (2 << 20, (256, 512, 512)) if quick else (_BYTES[kind], _GEMM[kind])
    x, w = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
    reads, how = dense.stream(nbytes, device)
    effort = QUICK if quick else Effort(seconds=2.0)
    times = measure({"read": reads, "gemm": [lambda: F.linear(x, w)]}, effort, device=device)
    return {
        "bytes_per_second": nbytes / min(times["read"]),
        "flops_per_second": 2 * m * n * k / min(times["gemm"]),
        "memory": f"{how} of {nbytes >> 20} MiB",
        "gemm": f"{m} x {n} x {k} {dtype_name(dtype)}",
    }


def floor_seconds(ceilings: dict[str, Any], flops: float, nbytes: float) -> float | None:
    """The time that neither the arithmetic nor the traffic can undercut; None when a case states neither."""
    if not flops and not nbytes:
        return None
    return max(flops / ceilings["flops_per_second"], nbytes / ceilings["bytes_per_second"])
