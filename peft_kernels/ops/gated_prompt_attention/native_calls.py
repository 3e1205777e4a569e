"""The gated prompt's part on the native core: the kernels of `prefix_attention`, with a gate."""

from __future__ import annotations

import torch

from ..prefix_attention.native_calls import backward, forward, keys_backward, own_keys, why_not

__all__ = ["backward", "forward", "keys_backward", "takes_keys", "why_not"]


def takes_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `keys_backward` is ours, and torch's attention the flash kernel whose log-sum-exp it needs."""
    unit_strides = k.stride(-1) == 1 and v.stride(-1) == 1  # else torch takes its unfused attention
    return q.numel() > 0 and unit_strides and own_keys(q, k, mask) and _flash_enabled()


def _flash_enabled() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()  # the CPU's too, despite its name


_flash_enabled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it has no arguments
