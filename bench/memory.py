"""The peak resident set of this process, without what came before: Linux only."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")


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
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # the line reads "VmHWM:   12345 kB"
