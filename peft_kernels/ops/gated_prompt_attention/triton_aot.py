"""The calls that are compiled ahead of time for `gated_prompt_attention`: those of `prefix_attention`, with a gate."""

from functools import partial

from ..prefix_attention import triton_aot

cases = partial(triton_aot.cases, gated=True)
