"""The calls that are compiled ahead of time for `prefix_attention`, and with a gate for `gated_prompt_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from .triton_kernels import backward, forward


def call(length: int, width: int, prompt: int, dtype: torch.dtype, *, gated: bool, per_sample: bool = False) -> None:
    """Forward and backward of four samples, 32 heads over 8."""
    q, dy, out, dq = (torch.empty(4, length, 32, width, dtype=dtype).transpose(1, 2) for _ in range(4))
    shape = (4, 8, prompt, width) if per_sample else (8, prompt, width)
    prompt_k, prompt_v = (torch.empty(shape, dtype=dtype) for _ in range(2))
    lse, gate = torch.empty(4, 32, length), torch.empty(32) if gated else None
    forward(q, prompt_k, prompt_v, out, lse, gate, 0.1, out)
    backward(dy, q, prompt_k, prompt_v, out, lse, gate, 0.1, dq, True)


def cases() -> Iterator[Case]:
    """Every tile; the longest prompts, and those of one tile; decoding."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for width, prompt in ((64, 64), (128, 32), (128, 64)):
        yield Case(f"D={width} P={prompt} bf16", 0, partial(call, 2048, width, prompt, bf16, gated=False))
    for width in (64, 128, 256):
        yield Case(f"D={width} P=512 bf16", 0, partial(call, 2048, width, 512, bf16, gated=False))
    yield Case("D=64 P=512 fp32", 0, partial(call, 2048, 64, 512, fp32, gated=False))
    yield Case("L=1 D=128 P=32 fp16", 0, partial(call, 1, 128, 32, torch.float16, gated=False))
