"""What the tests of the prompt attentions share: the same results by torch's own attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from peft_kernels.ops.prefix_attention.arguments import additive_mask
from peft_kernels.testing import assert_within_budget


class AttentionCase:
    """One call: its arguments as attributes, with `dy` and `options`, and the call in three arithmetics."""

    names: tuple[str, ...]
    function: Callable  # the operation; its reference; the same by torch's fused attention
    reference: Callable
    fused: Callable

    def arguments(self):
        return [getattr(self, name) for name in self.names]

    def run(self, function, cast=lambda t: t):
        """y and every gradient, by name."""
        leaves = [cast(t).detach().requires_grad_() for t in self.arguments()]
        options = dict(self.options)
        if (mask := options.get("attn_mask")) is not None and mask.dtype != torch.bool:
            options["attn_mask"] = cast(mask)
        y = function(*leaves, **options)
        gradients = torch.autograd.grad(y, leaves, cast(self.dy))
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(self.names, gradients, strict=True)}}

    def check(self, backend, function=None):
        """Everything within the error budget; that of torch's fused attention for the kernels."""
        cls = type(self)
        ours = self.run(function or cls.function)
        truth = self.run(cls.reference, lambda t: t.double())
        eager = self.run(cls.reference if backend == "reference" else cls.fused)
        for name, value in ours.items():
            assert_within_budget(value, truth[name], eager[name], name)


def _attention(q, k, v, attn_mask, is_causal, scale):
    """torch's fused attention; a mask and causality may come together."""
    if q.is_cuda:  # few of its kernels there take grouped heads; the others give way to products in float32
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if attn_mask is not None:
        attn_mask = additive_mask(attn_mask, is_causal, q.shape[2], k.shape[2], q.dtype, q.device)
    options = {"is_causal": is_causal and attn_mask is None, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)


def concatenated(q, k, v, prefix_k, prefix_v, *, attn_mask=None, is_causal=False, scale=None):
    """What one writes without prefix_attention: torch's attention over the prefix, repeated, and the keys."""
    (batch, _, length, _), keys, prefix = q.shape, k.shape[2], prefix_k.shape[1]
    mask = additive_mask(attn_mask, is_causal, length, keys, q.dtype, q.device)
    if mask is not None:
        mask = F.pad(mask.to(q.dtype).expand(-1, -1, length, keys), (prefix, 0))
    k, v = (torch.cat([p.to(q.dtype).expand(batch, -1, -1, -1), t], dim=2) for p, t in ((prefix_k, k), (prefix_v, v)))
    return _attention(q, k, v, mask, False, scale)


def two_attentions(q, k, v, prompt_k, prompt_v, gate, *, attn_mask=None, is_causal=False, scale=None):
    """What one writes without gated_prompt_attention: torch's attention twice, the prompt repeated over the batch."""
    prompt_k, prompt_v = (p.to(q.dtype).expand(q.shape[0], *p.shape[-3:]) for p in (prompt_k, prompt_v))
    prompted = _attention(q, prompt_k, prompt_v, None, False, scale)
    return _attention(q, k, v, attn_mask, is_causal, scale) + gate.to(q.dtype).reshape(-1, 1, 1) * prompted
