"""Peak memory: of this process without what came before (Linux), and of one call on any device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def measurable() -> bool:
    """Whether this system can tell."""
    return _CLEAR.exists()


def forget_peak() -> None:
    """Start anew from what is in use now; what loading took no longer counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")


def peak() -> int:
    """Peak resident bytes since `forget_peak`."""
    return _resident("VmHWM")


def of_call(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that the call takes at its peak, beyond what was in use before it; None where it cannot be told.

    Its result counts. Scratch that a kernel keeps from call to call was in use before, and does not.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        call()
        module.synchronize()
        return module.max_memory_allocated() - before
    if not measurable():
        return None
    forget_peak()
    before = _resident("VmRSS")
    call()
    return max(0, peak() - before)


def _resident(field: str) -> int:
    """Bytes of a line like "VmHWM:   12345 kB"."""
    return int(_STATUS.read_text().partition(f"{field}:")[2].split()[0]) * 1024
