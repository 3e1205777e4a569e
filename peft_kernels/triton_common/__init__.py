"""Triton device functions that the operations share; imported only when a Triton kernel is wanted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.is_available() or interpreting():
        return None
    return "no CUDA or ROCm device"


def why_not_tensor(name: str, x: torch.Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why Triton kernels cannot run on `x`, an argument called `name`."""
    if x.dtype not in dtypes:
        return f"it takes {', '.join(str(dtype) for dtype in dtypes)}, {name} is {x.dtype}"
    if x.device.type != ("cpu" if interpreting() else "cuda"):
        return why_not() or f"it runs on a GPU, {name} is on {x.device}"
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 (tensor cores with bfloat16)"
    return why_not()
