"""The gated prompt's part on the GPU: the kernels of `prefix_attention`, with a gate."""

from ..prefix_attention.triton_kernels import backward, forward, keys_backward, why_not

__all__ = ["backward", "forward", "keys_backward", "why_not"]
