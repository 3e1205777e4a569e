"""Peak memory: of this process without what came before (Linux), and of one call on any device."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_M_ARENA_MAX = -8  # of glibc's malloc.h
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _one_heap() -> None:
    """From now on all threads share one heap: glibc would not give back the top of a thread's own, and hide its use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


_one_heap()


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

    Its result counts, and so does the scratch that a kernel keeps for its next call: on a CPU the call is made in a
    thread that has none yet, on a GPU ours is given back first.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        _forget_scratch()
        gc.collect()
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        call()
        module.synchronize()
        return module.max_memory_allocated() - before
    if not measurable():
        return None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread itself is there
        forget_peak()
        before = _resident("VmRSS")
        pool.submit(call).result()
        return max(0, peak() - before)


def _forget_scratch() -> None:
    """Let go of the buffers that our modules keep."""
    for name, module in list(sys.modules.items()):
        buffers = getattr(module, "_scratch", None) if name.startswith("peft_kernels.") else None
        if isinstance(buffers, dict):
            buffers.clear()


def _resident(field: str) -> int:
    """Bytes of a line like "VmHWM:   12345 kB"."""
    return int(_STATUS.read_text().partition(f"{field}:")[2].split()[0]) * 1024
