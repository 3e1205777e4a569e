"""The calls that are compiled ahead of time for `prefix_attention`, and with a gate for `gated_prompt_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from .triton_kernels import backward, forward


def call(
    length: int, width: int, prompt: int, dtype: torch.dtype, *, gated: bool, prompt_dtype: torch.dtype | None = None
) -> None:
    """Forward and backward of four samples, 32 heads over 8."""
    q, dy, out, dq = (torch.empty(4, length, 32, width, dtype=dtype).transpose(1, 2) for _ in range(4))
    prompt_k, prompt_v = (torch.empty(8, prompt, width, dtype=prompt_dtype or dtype) for _ in range(2))
    lse, gate = torch.empty(4, 32, length), torch.empty(32) if gated else None
    forward(q, prompt_k, prompt_v, out, lse, gate, 0.1, out)
    backward(dy, q, prompt_k, prompt_v, out, lse, gate, 0.1, dq, True)


def cases(gated: bool = False) -> Iterator[Case]:
    """Every width's tile in 16 and in 32 bits; the longest and the shortest prompts; decoding."""
    bf16 = torch.bfloat16
    for width in (32, 80, 128, 256):
        yield Case(f"L=2048 D={width} P=512 bf16", 2048, partial(call, 2048, width, 512, bf16, gated=gated))
        yield Case(f"L=2048 D={width} P=512 fp32", 0, partial(call, 2048, width, 512, torch.float32, gated=gated))
    yield Case("L=2048 D=128 P=10 bf16", 0, partial(call, 2048, 128, 10, bf16, gated=gated))
    yield Case("L=1 D=128 P=32 fp16", 1, partial(call, 1, 128, 32, torch.float16, gated=gated))
    mixed = partial(call, 2048, 128, 32, bf16, gated=gated, prompt_dtype=torch.float32)
    yield Case("L=2048 D=128 P=32 bf16, fp32 prompts", 0, mixed)
