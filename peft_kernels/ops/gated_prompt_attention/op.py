"""Attention plus a gated attention over a learned prompt: the public function and its library operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ... import dispatch
from ...autograd import once_differentiable
from ..prefix_attention import library
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
from .native_calls import takes_keys

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "gated_prompt_attention_forward(Tensor base, Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor gate, "
    "float scale, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "gated_prompt_attention_backward(Tensor dy, Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor gate, Tensor lse, "
    "Tensor[] keys, bool is_causal, float scale, bool[] needs, str backend) -> Tensor[]"
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
    if attn_mask is not None and (is_causal or not _taken_by_torch(attn_mask, q)):
        attn_mask = additive_mask(attn_mask, is_causal, q.shape[2], k.shape[2], q.dtype, q.device)
        is_causal = False
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    train = torch.is_grad_enabled()
    if train and any(t.requires_grad for t in (q, k, v)) and _owns_keys(backend, q, k, v, attn_mask, is_causal, factor):
        return _GatedPromptAttention.apply(None, q, k, v, prompt_k, prompt_v, gate, is_causal, factor, backend)
    base = F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1])
    )
    tensors = (prompt_k, prompt_v, gate)
    if train and any(t.requires_grad for t in (base, q, *tensors)):
        return _GatedPromptAttention.apply(base, q, None, None, *tensors, is_causal, factor, backend)
    return torch.ops.peft_kernels.gated_prompt_attention_forward(base, q, *tensors, factor, backend)[0]


def _owns_keys(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, is_causal: bool, scale: float
) -> bool:
    """Whether the operation has the keys' backward too, so that one kernel adds both parts of dq."""
    if backend == "native":
        return takes_keys(q, k, v, mask)
    return not torch.compiler.is_compiling() and library.is_plain(q, k, v, mask, is_causal, scale)


def _taken_by_torch(attn_mask: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether torch's attention takes the mask as it is."""
    return attn_mask.ndim >= 2 and attn_mask.dtype in (torch.bool, q.dtype, torch.float32)


class _GatedPromptAttention(torch.autograd.Function):
    """Of the prompt alone, given base; or, given k and v, of the attention over the keys too.

    That attention is torch's either way, bit for bit: only its backward may be the backend's own.
    """

    @staticmethod
    def forward(ctx: Any, base: Any, q: torch.Tensor, k: Any, v: Any, *arguments: Any):
        *prompt, ctx.is_causal, ctx.scale, ctx.backend = arguments
        keys: tuple = ()
        if base is None:
            base, base_lse = library.forward(q, k, v, None, ctx.is_causal, ctx.scale)
            keys = k, v, base, base_lse.contiguous()
        out, lse = torch.ops.peft_kernels.gated_prompt_attention_forward(base, q, *prompt, ctx.scale, ctx.backend)
        ctx.save_for_backward(q, *prompt, lse, *keys)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        need_base, *need = ctx.needs_input_grad[:7]
        q, prompt_k, prompt_v, gate, lse, *keys = ctx.saved_tensors
        dq = dprompt_k = dprompt_v = dgate = dk = dv = None
        if any(need):
            needs = [need[0], need[3] or need[4], need[5]]
            dq, dprompt_k, dprompt_v, dgate, *dkeys = torch.ops.peft_kernels.gated_prompt_attention_backward(
                dy, q, prompt_k, prompt_v, gate, lse, keys, ctx.is_causal, ctx.scale, needs, ctx.backend
            )
            dk, dv = dkeys or (None, None)
        grads = (dq, dk, dv, dprompt_k, dprompt_v, dgate)
        wanted = (grad if flag else None for grad, flag in zip(grads, need, strict=True))
        return dy if need_base else None, *wanted, None, None, None


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
def _backward(dy, q, prompt_k, prompt_v, gate, lse, keys, is_causal, scale, needs, backend):
    outs = _backward_fake(dy, q, prompt_k, prompt_v, gate, lse, keys, is_causal, scale, needs, backend)
    if q.numel() == 0:
        return [out.zero_() for out in outs]
    implementation = dispatch.implementation("gated_prompt_attention", backend)
    gates = gate.float().expand(q.shape[1]).contiguous()
    dq, options, dkeys = outs[0], {}, ()
    if keys:
        k, v, base, base_lse = keys
        dq, *dkeys = implementation.keys_backward(dy, q, k, v, base, base_lse, None, is_causal, scale)
        options = {"add_dq": True}
    dprompt_k, dprompt_v, dgates = implementation.backward(
        dy, q, prompt_k, prompt_v, None, lse, gates, scale, dq if needs[0] else None, needs[1], **options
    )
    dgate = (dgates if gate.numel() > 1 else dgates.sum(0, keepdim=True)).to(gate.dtype)
    return [dq if needs[0] else outs[0], dprompt_k, dprompt_v, dgate if needs[2] else outs[3], *dkeys]


@torch.library.register_fake("peft_kernels::gated_prompt_attention_backward", lib=_lib)
def _backward_fake(dy, q, prompt_k, prompt_v, gate, lse, keys, is_causal, scale, needs, backend):
    dq = (library.token_major(q) if keys else torch.empty_like(q)) if needs[0] else q.new_empty(0)
    dprompts = [p.new_empty(p.shape if needs[1] else 0) for p in (prompt_k, prompt_v)]
    dkeys = [library.token_major(t) for t in keys[:2]]
    return [dq, *dprompts, gate.new_empty(gate.shape if needs[2] else 0), *dkeys]
