"""Attention plus a gated attention over a learned prompt: the public function and its library operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ... import dispatch
from ..prefix_attention.arguments import (
    additive_mask,
    autocast,
    check_attention,
    check_gate,
    check_mask,
    check_prompt,
    rows_of_heads,
)
from . import reference

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "gated_prompt_attention_forward(Tensor base, Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor gate, "
    "float scale, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "gated_prompt_attention_backward(Tensor dy, Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor gate, Tensor lse, "
    "float scale, bool[] needs, str backend) -> Tensor[]"
)


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
    """Attention plus a gated attention over a prompt: Y = SDPA(q, k, v) + g * softmax(scale q prompt_k^T) prompt_v.

    The prompt has a softmax of its own, every query sees all of it, and no mask concerns it. Where the gate is zero Y
    is torch's scaled_dot_product_attention bit for bit, while the gate gets its gradient. Backward, with P the prompt's
    softmax and dP = dY prompt_v^T: dg = sum P * dP, in the pass that computes the other gradients.

    Args:
        q: (B, H, L, D) bfloat16, float16 or float32. k, v: (B, Hkv, S, D) of q's dtype, Hkv dividing H.
        prompt_k, prompt_v: (Hkv, P, D), shared by the batch, or (B, Hkv, P, D), a sample's own; of any floating dtype,
            rounded to q's. The gradient of a shared prompt is summed over the batch in a fixed order.
        gate: (H,), one element, or a number: the factor itself. The paper's tanh is applied before the call (by
            `peft_kernels.nn.GatedPromptAttention`); Hugging Face PEFT has none.
        attn_mask, is_causal, scale: as in torch's scaled_dot_product_attention, for the keys; mask and causality may
            come together. scale is the prompt's too.

    Returns:
        Tensor: (B, H, L, D) of q's dtype, the prompt's part accumulated in float32 and added before one rounding.

    Saved for backward: q, the prompt's log-sum-exp (B, H, L) float32, and what torch saves for the attention over the
    keys.

    Raises:
        ValueError: a shape, dtype or device does not fit. BackendError: the backend asked for by name cannot run this.

    Source: LLaMA-Adapter, arXiv:2303.16199, equations 5 to 8.
    """
    check_attention(q, k, v)
    check_prompt("prompt", prompt_k, prompt_v, q, k.shape[1])
    check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    gate = check_gate(gate, q)
    q, k, v = autocast(q, k, v)
    backend = dispatch.choose("gated_prompt_attention", q.device, (q.dtype, prompt_k.dtype, gate.dtype))
    if backend == "reference":
        return reference.gated_prompt_attention(
            q, k, v, prompt_k, prompt_v, gate, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
    q, prompt_k, prompt_v = rows_of_heads(q, prompt_k, prompt_v)
    if attn_mask is not None and is_causal:
        attn_mask = additive_mask(attn_mask, True, q.shape[2], k.shape[2], q.dtype, q.device)
        is_causal = False
    base = F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (base, q, prompt_k, prompt_v, gate, scale, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:5]):
        return _GatedPromptAttention.apply(*arguments)
    return torch.ops.peft_kernels.gated_prompt_attention_forward(*arguments)[0]


class _GatedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, *arguments: Any):
        out, lse = torch.ops.peft_kernels.gated_prompt_attention_forward(base, *arguments)
        *tensors, ctx.scale, ctx.backend = arguments
        ctx.save_for_backward(*tensors, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        need = ctx.needs_input_grad[:5]
        grads = [None] * 4
        if any(need[1:]):
            needs = [need[1], need[2] or need[3], need[4]]
            grads = torch.ops.peft_kernels.gated_prompt_attention_backward(
                dy, *ctx.saved_tensors, ctx.scale, needs, ctx.backend
            )
        wanted = (grad if flag else None for grad, flag in zip(grads, need[1:], strict=True))
        return dy if need[0] else None, *wanted, None, None


@torch.library.impl(_lib, "gated_prompt_attention_forward", "CompositeExplicitAutograd")
def _forward(base, q, prompt_k, prompt_v, gate, scale, backend):
    out, lse = _forward_fake(base, q, prompt_k, prompt_v, gate, scale, backend)
    if q.numel():
        gates = gate.float().expand(q.shape[1]).contiguous()
        dispatch.implementation("gated_prompt_attention", backend).forward(
            q, prompt_k, prompt_v, *rows_of_heads(base), lse, gates, scale, out
        )
    return out, lse


@torch.library.register_fake("peft_kernels::gated_prompt_attention_forward", lib=_lib)
def _forward_fake(base, q, prompt_k, prompt_v, gate, scale, backend):
    return torch.empty_like(base), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(_lib, "gated_prompt_attention_backward", "CompositeExplicitAutograd")
def _backward(dy, q, prompt_k, prompt_v, gate, lse, scale, needs, backend):
    outs = _backward_fake(dy, q, prompt_k, prompt_v, gate, lse, scale, needs, backend)
    if q.numel() == 0:
        return [out.zero_() for out in outs]
    gates = gate.float().expand(q.shape[1]).contiguous()
    dprompt_k, dprompt_v, dgates = dispatch.implementation("gated_prompt_attention", backend).backward(
        dy, q, prompt_k, prompt_v, None, lse, gates, scale, outs[0] if needs[0] else None, needs[1]
    )
    dgate = (dgates if gate.numel() > 1 else dgates.sum(0, keepdim=True)).to(gate.dtype)
    return [outs[0], dprompt_k, dprompt_v, dgate if needs[2] else outs[3]]


@torch.library.register_fake("peft_kernels::gated_prompt_attention_backward", lib=_lib)
def _backward_fake(dy, q, prompt_k, prompt_v, gate, lse, scale, needs, backend):
    dq = torch.empty_like(q) if needs[0] else q.new_empty(0)
    dprompts = [p.new_empty(p.shape if needs[1] else 0) for p in (prompt_k, prompt_v)]
    return [dq, *dprompts, gate.new_empty(gate.shape if needs[2] else 0)]
