"""The one door to a kernel launch, so that the same host code can also be recorded and compiled ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import interpreting


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels are tuned for: kind "cuda" or "hip", arch 80, 90, 100 or "gfx942", multiprocessors, bytes of L2."""

    kind: str
    arch: int | str
    multiprocessors: int
    l2: int = 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


if interpreting():
    from .interpreter import mend

    mend()

# A few programs, so that the interpreter takes the split paths too.
_INTERPRETER = Target("cpu", 0, 4)
_recording: tuple[Target, list[Launch]] | None = None
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# What Triton specializes a kernel on for NVIDIA, and the exact numbers -> the compiled kernel. Found here, a launch
# takes a third of the host time of Triton's own way, which is 50 microseconds with forty arguments.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096


def cdiv(a: int, b: int) -> int:
    """a / b rounded up: Triton's own takes microseconds of a call that has few of them."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not below n >= 1; as above."""
    return 1 << (n - 1).bit_length()


def target(device: torch.device) -> Target:
    """The target that a launch on `device` is for."""
    if _recording is not None:
        return _recording[0]
    return _INTERPRETER if interpreting() else _device_target(device.index or 0)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch: int | str = properties.gcnArchName.split(":")[0]
    else:
        arch = 10 * properties.major + properties.minor
    kind = "cuda" if torch.version.hip is None else "hip"
    return Target(kind, arch, properties.multi_processor_count, properties.L2_cache_size)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **kwargs: Any) -> None:
    """Run `kernel` over `grid` on `device`; kwargs are its arguments and num_warps, num_stages, enable_fp_fusion."""
    if _recording is not None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        _recording[1].append(Launch(kernel, grid, kwargs, options))
    elif interpreting() or torch.version.hip is not None:
        kernel[grid](**kwargs)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, kwargs)
    else:
        _launch(kernel, grid, device, kwargs)


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, kwargs: dict[str, Any]) -> None:
    args = [kwargs[name] for name in kernel.arg_names]
    # of a tensor: the type, and whether its address is a multiple of 16 bytes; a float is told from an equal integer
    special = [
        (a.dtype if a.data_ptr() % 16 == 0 else (a.dtype,))
        if isinstance(a, torch.Tensor)
        else ((float, a) if type(a) is float else a)
        for a in args
    ]
    key = (id(kernel), device.index, *map(kwargs.get, _OPTIONS), *special)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*args)
        return
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = kernel[grid](**kwargs)


@contextlib.contextmanager
def record(for_target: Target) -> Iterator[list[Launch]]:
    """Collect the launches that host code would make on `for_target` instead of making them."""
    global _recording
    previous, _recording = _recording, (for_target, [])
    try:
        yield _recording[1]
    finally:
        _recording = previous
