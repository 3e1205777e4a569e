"""The calls that are compiled ahead of time for `prompt_embedding`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ...triton_common.aot import Case
from .triton_kernels import dprompt, dweight, forward


def cases() -> Iterator[Case]:
    """Forward and both gradients at a real width, and an odd one in float32."""
    for hidden, dtype in ((4096, torch.bfloat16), (577, torch.float32)):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"forward {hidden} {name}", 0, functools.partial(_forward, hidden, dtype))
        yield Case(f"dprompt {hidden} {name}", 0, functools.partial(_dprompt, hidden, dtype))
        yield Case(f"dweight {hidden} {name}", 0, functools.partial(_dweight, hidden, dtype))


def _forward(hidden: int, dtype: torch.dtype) -> None:
    weight, out = torch.empty(32000, hidden, dtype=dtype), torch.empty(4, 532, hidden, dtype=dtype)
    forward(torch.empty(4, 512, dtype=torch.int64), weight, torch.empty(20, hidden), out)


def _dprompt(hidden: int, dtype: torch.dtype) -> None:
    dprompt(torch.empty(4, 532, hidden, dtype=dtype), torch.empty(20, hidden))


def _dweight(hidden: int, dtype: torch.dtype) -> None:
    ids = torch.empty(4 * 512, dtype=torch.int64)
    dweight(torch.empty(4, 512, hidden, dtype=dtype), ids, ids, torch.empty(32000, hidden, dtype=dtype))
