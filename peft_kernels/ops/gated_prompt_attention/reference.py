"""`gated_prompt_attention` in pure torch: the oracle."""

from __future__ import annotations

import torch

from ..prefix_attention.arguments import additive_mask, autocast, check_attention, check_gate, check_mask, check_prompt
from ..prefix_attention.reference import attention


def gated_prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    gate: torch.Tensor | float,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """See `peft_kernels.functional.gated_prompt_attention`."""
    check_attention(q, k, v)
    check_prompt("prompt", prompt_k, prompt_v, q, k.shape[1])
    check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    gate = check_gate(gate, q)
    q, k, v = autocast(q, k, v)
    mask = additive_mask(attn_mask, is_causal, q.shape[2], k.shape[2], q.dtype, q.device)
    prompt_k, prompt_v = (t.to(q.dtype).expand(q.shape[0], *t.shape[-3:]) for t in (prompt_k, prompt_v))
    prompted = attention(q, prompt_k, prompt_v, None, scale)
    return attention(q, k, v, mask, scale) + gate.to(q.dtype).reshape(-1, 1, 1) * prompted
