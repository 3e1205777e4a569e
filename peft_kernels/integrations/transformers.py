"""The attention function `peft_kernels` in transformers' registry: torch's attention, learned prompts beside the keys.

A prefix travels with the keys, from a `PrefixCache` to the attention function, so that no model's code has to know of
it; a gated prompt comes as a keyword argument. Without either the function is transformers' own `sdpa`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import dispatch
from ..functional import gated_prompt_attention, prefix_attention

ATTENTION, BEFORE = "peft_kernels", "sdpa"  # the attention's name, and that of the one whose place it takes
_GROWTH = 64  # tokens that a cache layer gets room for, or a quarter of what it holds
_PREFIX = "peft_kernels_prefix"  # the attribute of a tensor of keys


class PrefixLayer(DynamicLayer):
    """A cache layer with a prefix (Hkv, P, D) apart from its keys; its length and positions count both."""

    keys: Any  # None before the first update
    values: Any

    def __init__(self, prefix_k: torch.Tensor, prefix_v: torch.Tensor):
        super().__init__()
        self.prefix = prefix_k, prefix_v
        self._room: dict[str, torch.Tensor] = {}  # what keys and values are the beginning of, with room to grow

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new keys and values; all of them, the keys with the prefix as an attribute."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        elif torch.is_grad_enabled():
            super().update(key_states, value_states)
        else:
            self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        setattr(self.keys, _PREFIX, self.prefix)
        return self.keys, self.values

    def _append(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The old states and the new ones; only where there is no more room are the old ones copied."""
        old: torch.Tensor = getattr(self, name)
        length = old.shape[-2] + states.shape[-2]
        room = self._room.get(name)
        if room is None or not _begins(room, old) or room.shape[-2] < length:
            room = old.new_empty((*old.shape[:2], length + max(length // 4, _GROWTH), old.shape[-1]))
            room[:, :, : old.shape[-2]] = old
            self._room[name] = room
        room[:, :, old.shape[-2] : length] = states
        return room[:, :, :length]

    def get_seq_length(self) -> int:
        """P and the number of keys."""
        return self.prefix[0].shape[1] + (self.keys.shape[-2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is for the keys alone, which start at position P."""
        tokens = self.prefix[0].shape[1]
        return self.get_seq_length() - tokens + query_length, tokens


def _begins(room: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether `old` is the beginning of `room`, and that may be written here."""
    same = old.data_ptr() == room.data_ptr() and old.stride() == room.stride()
    return same and room.is_inference() == torch.is_inference_mode_enabled()


class PrefixCache(DynamicCache):
    """A KV cache whose layers have a prefix, which is neither repeated over the batch nor copied at every token."""

    def __init__(self, prefixes: Iterable[tuple[torch.Tensor, torch.Tensor]]):
        Cache.__init__(self, layers=[PrefixLayer(k, v) for k, v in prefixes])


@dataclasses.dataclass
class GatedPrompt:
    """A prompt (Hkv, P, D) and its gate for one attention layer.

    apart: leave the prompt's part in `output` (B, H, L, D) rather than add it to the attention.
    """

    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor
    apart: bool = False
    output: torch.Tensor | None = None


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    gated_prompt: GatedPrompt | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, H, L, D), key and value (B, Hkv, S, D) -> (B, L, H, D)."""
    prefix = getattr(key, _PREFIX, None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    options: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling}
    if gated_prompt is not None and prefix is None and dropout == 0 and not gated_prompt.apart:
        prompt = gated_prompt.key, gated_prompt.value, gated_prompt.gate
        return gated_prompt_attention(query, key, value, *prompt, **options).transpose(1, 2).contiguous(), None
    if prefix is not None:
        reason = _why_concatenated(prefix, key, attention_mask, dropout, kwargs.get("sliding_window"))
        if reason is None:
            out = prefix_attention(query, key, value, *prefix, **options).transpose(1, 2).contiguous()
        else:
            dispatch.note(f"prefix_attention is not called: {reason}")
            window = kwargs.get("sliding_window")
            key, value, mask = _concatenated(query, key, value, attention_mask, prefix, causal, window)
            out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=False)
    else:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if gated_prompt is not None:
        part = _prompt_part(query, gated_prompt)
        if gated_prompt.apart:
            gated_prompt.output = part
        else:
            out = out + part.transpose(1, 2)
    return out, None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _why_concatenated(
    prefix: tuple[torch.Tensor, torch.Tensor],
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    window: int | None,
) -> str | None:
    """Why the kernel cannot serve this call, or None."""
    tokens, keys = prefix[0].shape[1], key.shape[2]
    if dropout:
        return "attention weights are dropped out"
    if window is not None and tokens + keys > window:
        return "the prefix slides out of the window"
    if mask is not None and mask.shape[-1] != keys:
        return "the mask has columns for the prefix"
    return None


def _concatenated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: tuple[torch.Tensor, torch.Tensor],
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefix and keys in one tensor for each sample, as PEFT has them; values; and the mask over both."""
    batch, length, tokens, seen = query.shape[0], query.shape[2], prefix[0].shape[1], key.shape[2]
    device = query.device
    if mask is None:
        mask = torch.ones(length, seen, dtype=torch.bool, device=device)
        mask = (mask.tril() if causal else mask)[None, None]
    if mask.shape[-1] != tokens + seen:
        columns = torch.ones(length, tokens, dtype=torch.bool, device=device)
        if window is not None:
            at = tokens + seen - length + torch.arange(length, device=device)
            columns = torch.arange(tokens, device=device) > at[:, None] - window
        if mask.dtype != torch.bool:
            columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill(~columns, torch.finfo(mask.dtype).min)
        mask = torch.cat((columns.expand(*mask.shape[:2], -1, -1), mask), dim=-1)
    key, value = (
        torch.cat((p.to(t.dtype).expand(batch, -1, -1, -1), t), dim=2)
        for p, t in zip(prefix, (key, value), strict=True)
    )
    return key, value, mask


def _prompt_part(query: torch.Tensor, prompt: GatedPrompt) -> torch.Tensor:
    """gate * softmax(q key^T / sqrt(D)) value (B, H, L, D)."""
    key, value = (t.to(query.dtype).expand(query.shape[0], -1, -1, -1) for t in (prompt.key, prompt.value))
    attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1])
    return prompt.gate.to(query.dtype) * attended
