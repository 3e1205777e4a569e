"""Hugging Face PEFT's prompt methods on transformers' Llama: a LLaMA-Adapter layer, and a model with a prefix."""

from __future__ import annotations

from typing import Any

import torch

from . import missing

NAME = "peft"


def why_not() -> str | None:
    """Why it cannot run here."""
    return missing("peft", "transformers")


def _config(width: int, heads: int, kv_heads: int, layers: int) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=1024,
        attn_implementation="sdpa",
    )


class AdaptedLayer(torch.nn.Module):
    """PEFT's attention with a LLaMA-Adapter prompt around a frozen LlamaAttention, at the positions 0 to L - 1."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, tokens: int, length: int, dtype: torch.dtype, device: Any
    ):
        super().__init__()
        from peft.tuners.adaption_prompt.layer import AdaptedAttention
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

        config = _config(width, heads, kv_heads, 1)
        attention = LlamaAttention(config, layer_idx=0).to(device, dtype).requires_grad_(False)
        self.adapted = AdaptedAttention("llama", tokens, attention)
        self.adapted.adaption_gate.data.fill_(0.5)
        self.positions = torch.arange(length, device=device)[None]
        self.rotary = LlamaRotaryEmbedding(config).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, width) -> (B, L, width)."""
        rotations = self.rotary(x, self.positions)
        return self.adapted(hidden_states=x, position_embeddings=rotations, attention_mask=None)[0]


def prefix_model(width: int, heads: int, kv_heads: int, layers: int, tokens: int) -> torch.nn.Module:
    """A small random Llama with a prefix, in eval mode and float32."""
    import peft
    import transformers

    model = transformers.LlamaForCausalLM(_config(width, heads, kv_heads, layers))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    return peft.get_peft_model(model, config).eval()


class Decoding:
    """One token decoded against a cache with the prefix and `ids`, again and again: the cache is cut back each time."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor):
        self.model, self.token = model, ids[:, -1:]
        with torch.no_grad():
            self.cache = model(input_ids=ids[:, :-1]).past_key_values

    @torch.no_grad()
    def __call__(self) -> dict[str, torch.Tensor]:
        logits = self.model.base_model(input_ids=self.token, past_key_values=self.cache).logits  # type: ignore
        self.cache.crop(-1)
        return {"y": logits}
