"""Loads the native core `peft_kernels._native`, and remembers why it could not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch  # loads the OpenMP runtime that the native core's symbols resolve to

_REMEDY = (
    "install a C++17 compiler and reinstall with PEFT_KERNELS_BUILD=cpu "
    "(in a checkout: `PEFT_KERNELS_BUILD=cpu python setup.py build_ext --inplace`)"
)
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cpu/dtype.h

_module: ModuleType | None = None
_reason: str | None = None


def constant_when_traced(function: Callable) -> Callable:
    """Let torch.compile take the result as it is rather than trace an import or a log line.

    This is torch.compiler.assume_constant_result without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


@constant_when_traced
def why_not() -> str | None:
    """None when the native core is usable, else why it is not and what to do about it."""
    return None if load() is not None else _reason


def dtype_code(dtype: torch.dtype) -> int:
    """The native code of a dtype that the kernels compute in; TypeError for any other."""
    try:
        return _DTYPE_CODES[dtype]
    except KeyError:
        raise TypeError(f"dtype must be float32, float16 or bfloat16 for native kernels, got {dtype}") from None
