"""Attention over a learned prefix and the keys: the public function, its autograd Function and its library ops."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from ...autograd import once_differentiable
from . import library, reference
from .arguments import (
    additive_mask,
    autocast,
    check_attention,
    check_mask,
    check_mask_is_constant,
    check_prompt,
    rows_of_heads,
)

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define(
    "prefix_attention_forward(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? mask, "
    "bool is_causal, float scale, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "prefix_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? mask, Tensor out, Tensor lse, bool is_causal, float scale, bool[] needs, str backend) -> Tensor[]"
)


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
    """Attention over [prefix; keys]: Y = softmax(scale q [prefix_k; k]^T + [0; mask]) [prefix_v; v].

    Every query sees the whole prefix; `attn_mask` and `is_causal` concern the keys alone. The part over the keys is
    torch's own attention, the part over the prefix and the merge of the two by their log-sum-exp run in one kernel:
    nothing is concatenated, and no prefix is repeated over the batch.

    Args:
        q: (B, H, L, D) bfloat16, float16 or float32. k, v: (B, Hkv, S, D) of q's dtype, Hkv dividing H.
        prefix_k, prefix_v: (Hkv, P, D) of any floating dtype, P >= 1. They are rounded to q's dtype; their gradients
            are summed over the batch and over the heads of a group, in a fixed order.
        attn_mask: bool (True: seen) or additive, broadcastable to (B, H, L, S). A query whose keys are all masked
            attends to the prefix. Padding and sliding windows come this way.
        is_causal: query i sees keys j <= i: aligned at the top left, as in torch's scaled_dot_product_attention, also
            where L != S. A token decoded against a cache therefore passes False. It may come with a mask.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        Tensor: (B, H, L, D) of q's dtype, laid out as q is. Under autocast, of the autocast dtype.

    Saved for backward: q, k, v, the output, and the log-sum-exp (B, H, L) float32. Scores, sums and the prefix's
    gradients are accumulated in float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; attn_mask requires a gradient, which only the reference
            backend computes. BackendError: the backend asked for by name cannot run this call.

    Source: Prefix-Tuning, arXiv:2101.00190, equation 3; P-Tuning v2, arXiv:2110.07602, section 3.2; the merge is
    FlashAttention's, arXiv:2205.14135, section 3.1.
    """
    check_attention(q, k, v)
    check_prompt("prefix", prefix_k, prefix_v, q, k.shape[1])
    check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    q, k, v = autocast(q, k, v)
    backend = dispatch.choose("prefix_attention", q.device, (q.dtype, prefix_k.dtype))
    if backend == "reference":
        return reference.prefix_attention(
            q, k, v, prefix_k, prefix_v, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
    check_mask_is_constant(attn_mask)
    q, k, v, prefix_k, prefix_v = rows_of_heads(q, k, v, prefix_k, prefix_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = None
    if attn_mask is not None:
        mask = additive_mask(attn_mask, is_causal, q.shape[2], k.shape[2], q.dtype, q.device)
        is_causal = False
    arguments = (q, k, v, prefix_k, prefix_v, mask, is_causal, scale, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, prefix_k, prefix_v)):
        return _PrefixAttention.apply(*arguments)
    return torch.ops.peft_kernels.prefix_attention_forward(*arguments)[0]


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any):
        out, lse = torch.ops.peft_kernels.prefix_attention_forward(*arguments)
        *tensors, ctx.is_causal, ctx.scale, ctx.backend = arguments
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        q, k, v, prefix_k, prefix_v, mask, out, lse = ctx.saved_tensors
        need = ctx.needs_input_grad[:5]
        needs = [need[0], need[1] or need[2], need[3] or need[4]]
        grads = torch.ops.peft_kernels.prefix_attention_backward(
            dy, q, k, v, prefix_k, prefix_v, mask, out, lse, ctx.is_causal, ctx.scale, needs, ctx.backend
        )
        return *(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), None, None, None, None


@torch.library.impl(_lib, "prefix_attention_forward", "CompositeExplicitAutograd")
def _forward(q, k, v, prefix_k, prefix_v, mask, is_causal, scale, backend):
    if q.numel() == 0:
        return _forward_fake(q, k, v, prefix_k, prefix_v, mask, is_causal, scale, backend)
    implementation = dispatch.implementation("prefix_attention", backend)
    keys, lse = implementation.keys_forward(q, k, v, mask, is_causal, scale)
    out = keys  # merged in place
    if not _same_layout(keys, q):
        out = torch.empty_like(q)
        if _same_layout(keys, out):
            out = keys
    implementation.forward(q, prefix_k, prefix_v, keys, lse, None, scale, out)
    return out, lse


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


@torch.library.register_fake("peft_kernels::prefix_attention_forward", lib=_lib)
def _forward_fake(q, k, v, prefix_k, prefix_v, mask, is_causal, scale, backend):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(_lib, "prefix_attention_backward", "CompositeExplicitAutograd")
def _backward(dy, q, k, v, prefix_k, prefix_v, mask, out, lse, is_causal, scale, needs, backend):
    if q.numel() == 0:
        fakes = _backward_fake(dy, q, k, v, prefix_k, prefix_v, mask, out, lse, is_causal, scale, needs, backend)
        return [fake.zero_() for fake in fakes]
    implementation = dispatch.implementation("prefix_attention", backend)
    dq, dk, dv = (q.new_empty(0) for _ in range(3))
    if needs[0] or needs[1]:
        grads = implementation.keys_backward(dy, q, k, v, out, lse, mask, is_causal, scale)
        dq, dk, dv = (_token_major(grad) for grad in grads)
    dprompts = implementation.backward(
        dy, q, prefix_k, prefix_v, out, lse, None, scale, dq if needs[0] else None, needs[2]
    )
    kept = ((dq, needs[0]), (dk, needs[1]), (dv, needs[1]))
    return [*(t if keep else t.new_empty(0) for t, keep in kept), *dprompts[:2]]


def _token_major(grad: torch.Tensor) -> torch.Tensor:
    """As the fake below lays it out; torch's kernels nearly always have."""
    rows = grad.transpose(1, 2)
    return grad if rows.is_contiguous() else rows.contiguous().transpose(1, 2)


@torch.library.register_fake("peft_kernels::prefix_attention_backward", lib=_lib)
def _backward_fake(dy, q, k, v, prefix_k, prefix_v, mask, out, lse, is_causal, scale, needs, backend):
    shaped = [*(library.token_major(t) for t in (q, k, v)), *(t.new_empty(t.shape) for t in (prefix_k, prefix_v))]
    wanted = (needs[0], needs[1], needs[1], needs[2], needs[2])
    return [t if keep else t.new_empty(0) for t, keep in zip(shaped, wanted, strict=True)]
