"""Loads the native core `peft_kernels._native` and its CUDA kernels, and remembers why it could not."""

from __future__ import annotations

import functools
import importlib
import platform
from types import ModuleType

import torch  # loads the OpenMP runtime that the native core's symbols resolve to

_REMEDY = (
    "install a C++17 compiler and reinstall with PEFT_KERNELS_BUILD=cpu "
    "(in a checkout: `PEFT_KERNELS_BUILD=cpu python setup.py build_ext --inplace`)"
)
_CUDA_REMEDY = "install nvcc, then reinstall with PEFT_KERNELS_BUILD=cuda"
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cpu/dtype.h

_X86 = platform.machine().lower() in ("x86_64", "amd64")

_module: ModuleType | None = None
_reason: str | None = None


def load() -> ModuleType | None:
    """The native module, imported on the first call, or None; `why_not` then has the reason."""
    global _module, _reason
    if _module is None and _reason is None:
        try:
            module = importlib.import_module("peft_kernels._native")
        except ImportError as error:
            _reason = f"the native core could not be imported ({error}); {_REMEDY}"
            return None
        module.isa()  # a misspelt PEFT_KERNELS_ISA raises here rather than being taken for a missing build
        _module = module
    return _module


def core() -> ModuleType:
    """The native module, for callers whose backend was chosen: `why_not` is None."""
    module = load()
    assert module is not None, _reason
    return module


def why_not() -> str | None:
    """None when the native core is usable, else why it is not and what to do about it."""
    return None if load() is not None else _reason


def why_not_tensors(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot compute with tensors of these dtypes on this device, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, x is on {device}"
    return _why_not_dtypes(dtypes) or why_not()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of such numbers.

    Where it has none, torch's matrix products and attention in half precision take several times as long as in float32
    (its float16 backward up to a hundred times), since they widen number by number.
    """
    if not _X86 or dtype not in (torch.bfloat16, torch.float16) or why_not() is not None:
        return True
    if dtype == torch.bfloat16:
        return core().isa() == "avx512bf16"
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch: its argument is a constant


def _why_not_dtypes(dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no native kernel takes tensors of these dtypes, or None."""
    for dtype in dtypes:
        if dtype not in _DTYPE_CODES:
            return f"it computes in bfloat16, float16 and float32, not {dtype}"
    return None


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    """(the CUDA kernels, None) or (None, why there are none); importing them needs no driver."""
    if load() is None:
        return None, _reason
    try:
        return importlib.import_module("peft_kernels._native_cuda"), None
    except ImportError as error:
        return None, f"its CUDA kernels could not be imported ({error}); {_CUDA_REMEDY}"


def has_cuda() -> bool:
    """Whether the CUDA kernels were built."""
    return _load_cuda()[0] is not None


def cuda_core() -> ModuleType:
    """The CUDA kernels, for callers whose backend was chosen: `why_not_cuda` is None."""
    module, reason = _load_cuda()
    assert module is not None, reason
    return module


def why_not_cuda(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the CUDA kernels cannot compute with an x of the first of these dtypes, or None."""
    if dtypes and dtypes[0] not in (torch.float16, torch.bfloat16):
        return f"its CUDA kernels take bfloat16 and float16, not {dtypes[0]}"
    if reason := _why_not_dtypes(dtypes):
        return reason
    module, reason = _load_cuda()
    if module is None:
        return reason
    if reason := module.device_unsupported(device.index or 0):
        return f"its CUDA kernels do not run on {device} ({reason}); PEFT_KERNELS_CUDA_ARCHS chooses at build time"
    return None


def cuda_place(device: torch.device) -> tuple[int, int]:
    """(device number, the current stream's handle)."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def readable(t: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous vector in a dtype that the kernels read: float32 for any that has no code."""
    return None if t is None else (t if t.dtype in _DTYPE_CODES else t.float()).contiguous()


def dtype_code(dtype: torch.dtype) -> int:
    """The native code of a dtype that the kernels compute in; TypeError for any other."""
    try:
        return _DTYPE_CODES[dtype]
    except KeyError:
        raise TypeError(f"dtype must be float32, float16 or bfloat16 for native kernels, got {dtype}") from None
