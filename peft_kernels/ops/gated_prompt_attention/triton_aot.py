"""The calls that are compiled ahead of time for `gated_prompt_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...triton_common.aot import Case
from ..prefix_attention.triton_aot import call


def cases() -> Iterator[Case]:
    """The widest tiles, with a gate; prompts of each sample's own."""
    yield Case("D=256 P=512 bf16", 0, partial(call, 2048, 256, 512, torch.bfloat16, gated=True))
    yield Case("D=64 P=64 bf16", 0, partial(call, 2048, 64, 64, torch.bfloat16, gated=True))
    yield Case("D=128 P=64 bf16", 0, partial(call, 2048, 128, 64, torch.bfloat16, gated=True))
    yield Case("D=64 P=10 fp32", 0, partial(call, 2048, 64, 10, torch.float32, gated=True))
    own = partial(call, 2048, 128, 10, torch.bfloat16, gated=True, per_sample=True)
    yield Case("D=128 P=10 bf16, per sample", 0, own)
