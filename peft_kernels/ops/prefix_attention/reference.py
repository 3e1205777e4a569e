"""`prefix_attention` in pure torch: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .arguments import additive_mask, autocast, check_attention, check_mask, check_prompt


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """See `peft_kernels.functional.prefix_attention`."""
    check_attention(q, k, v)
    check_prompt("prefix", prefix_k, prefix_v, q, k.shape[1])
    check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    q, k, v = autocast(q, k, v)
    batch, length, keys, prefix = q.shape[0], q.shape[2], k.shape[2], prefix_k.shape[1]
    mask = additive_mask(attn_mask, is_causal, length, keys, q.dtype, q.device)
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], keys), (prefix, 0))
    prefix_k, prefix_v = (t.to(q.dtype).expand(batch, -1, -1, -1) for t in (prefix_k, prefix_v))
    return attention(q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2), mask, scale)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v with k's heads repeated for their groups; zero where a row is masked whole."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return scores.softmax(dim=-1) @ v
    scores = scores + mask.to(q.dtype)
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
    return weights @ v
