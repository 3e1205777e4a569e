"""The part over the prompts by torch's matrix products in float32, for heads that the Triton kernels do not take.

Queries are gathered by prompt head, so that a shared prompt is not repeated over the batch here either.
"""

from __future__ import annotations

import torch


def forward(
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    base: torch.Tensor,
    lse: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write `out` and `lse`; see `native_calls.forward`."""
    scores = _gather(q, prompt_k) @ prompt_k.float().mT * scale
    prompted = _scatter(scores.softmax(dim=-1) @ prompt_v.float(), q, prompt_k)
    prompt_lse = _scatter(scores.logsumexp(dim=-1, keepdim=True), q, prompt_k)[..., 0]
    if gate is not None:
        out.copy_(torch.where(gate[:, None, None] == 0, base, base + gate[:, None, None] * prompted))
        lse.copy_(prompt_lse)
        return
    merged = torch.logaddexp(lse, prompt_lse)
    of_base, of_prompt = ((part - merged).exp()[..., None] for part in (lse, prompt_lse))
    out.copy_(of_base * base + of_prompt * prompted)
    lse.copy_(merged)


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    dq: torch.Tensor | None,
    need_prompts: bool,
    add_dq: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dprompt_k, dprompt_v, dgate or None); see `native_calls.backward`."""
    queries, upstream = _gather(q, prompt_k), _gather(dy, prompt_k)
    weights = (queries @ prompt_k.float().mT * scale - _gather(lse[..., None], prompt_k)).exp()
    dweights = upstream @ prompt_v.float().mT
    if gate is None:
        assert out is not None
        delta, factor = (
            (upstream * _gather(out, prompt_k)).sum(dim=-1, keepdim=True),
            torch.ones_like(upstream[..., :1]),
        )
    else:
        delta = (weights * dweights).sum(dim=-1, keepdim=True)
        factor = _gather(gate[:, None, None].expand(*q.shape[:3], 1), prompt_k)
    dscores = weights * (dweights - delta) * (scale * factor)
    if dq is not None:
        part = _scatter(dscores @ prompt_k.float(), q, prompt_k)
        dq.copy_(part + dq if add_dq else part)
    dgate = None if gate is None else _scatter(delta, q, prompt_k).sum(dim=(0, 2, 3))
    if not need_prompts:
        return prompt_k.new_empty(0), prompt_v.new_empty(0), dgate
    return (dscores.mT @ queries).to(prompt_k.dtype), ((weights * factor).mT @ upstream).to(prompt_v.dtype), dgate


def _gather(t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """(B, H, L, n) -> float32 (Hkv, B group L, n), or (B, Hkv, group L, n) where prompts come per sample."""
    t = t.float().unflatten(1, (prompt.shape[-3], -1))
    return t.flatten(2, 3) if prompt.ndim == 4 else t.transpose(0, 1).flatten(1, 3)


def _scatter(t: torch.Tensor, q: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The inverse of `_gather`, as (B, H, L, n)."""
    batch, heads, length, _ = q.shape
    if prompt.ndim == 3:
        t = t.unflatten(1, (batch, -1)).transpose(0, 1)
    return t.reshape(batch, heads, length, -1)
