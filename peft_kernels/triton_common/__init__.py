"""Triton device functions that the operations share; imported only when a Triton kernel is wanted."""

from __future__ import annotations

import importlib.util
import os

import torch


def why_not() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no CUDA or ROCm device"
