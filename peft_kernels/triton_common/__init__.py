"""Triton device functions that the operations share; imported only when a Triton kernel is wanted."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not (torch.cuda.is_available() or interpreting()):
        return "no CUDA or ROCm device"
    return _why_not_version()


@functools.cache
def _why_not_version() -> str | None:
    """Why the installed Triton is not new enough, or None: 3.5 multiplies no float32 as bfloat16 (`bf16x6`)."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it needs triton 3.6 or later (torch 2.10 comes with it), this is {triton.__version__}"
    return None


def why_not_tensors(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why Triton kernels cannot take tensors of these dtypes on this device."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it computes in bfloat16, float16 and float32, not {dtype}"
    if reason := why_not():
        return reason
    if device.type != ("cpu" if interpreting() else "cuda"):
        return f"it runs on a GPU, the tensors are on {device}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (tensor cores with bfloat16)"
    return None
