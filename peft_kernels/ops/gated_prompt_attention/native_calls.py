"""The gated prompt's part on the native core: the kernels of `prefix_attention`, with a gate."""

from ..prefix_attention.native_calls import backward, forward, why_not

__all__ = ["backward", "forward", "why_not"]
