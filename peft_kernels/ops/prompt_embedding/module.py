"""PromptEmbedding, PromptEncoder and PrefixEncoder: learned prompts, with or without a network that makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...checks import bad_value, check_virtual_tokens
from .op import prompt_embedding


class PromptEmbedding(nn.Module):
    """Prompt tuning: P learned tokens before the embedded ones; see `peft_kernels.functional.prompt_embedding`.

    The parameter is `embedding.weight` (P, hidden), as in Hugging Face PEFT.

    Args:
        num_virtual_tokens: P. hidden: the width of the model. They start standard normal.
    """

    def __init__(self, num_virtual_tokens: int, hidden: int, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        check_virtual_tokens(num_virtual_tokens)
        self.embedding = nn.Embedding(num_virtual_tokens, hidden, device=device, dtype=dtype)

    @classmethod
    def from_token_ids(
        cls, token_ids: Sequence[int], embedding_weight: torch.Tensor, num_virtual_tokens: int | None = None
    ) -> PromptEmbedding:
        """Start as the float32 embeddings of these tokens, repeated or cut to P where P is given."""
        ids = [int(i) for i in token_ids]
        tokens = len(ids) if num_virtual_tokens is None else num_virtual_tokens
        if not ids:
            raise bad_value("token_ids", "at least one id", "none", "Give a text that is not empty.")
        rows = torch.tensor([ids[i % len(ids)] for i in range(tokens)], device=embedding_weight.device)
        module = cls(tokens, embedding_weight.shape[1], device=embedding_weight.device, dtype=torch.float32)
        module.load_prompt_embeddings(embedding_weight.detach()[rows])
        return module

    @classmethod
    def from_text(
        cls,
        text: str,
        tokenizer: Callable[[str], Any],
        embedding_weight: torch.Tensor,
        num_virtual_tokens: int | None = None,
    ) -> PromptEmbedding:
        """Start as the embeddings of a text; tokenizer(text)["input_ids"] are its ids, as in transformers."""
        return cls.from_token_ids(tokenizer(text)["input_ids"], embedding_weight, num_virtual_tokens)

    @classmethod
    def from_vocabulary(
        cls, embedding_weight: torch.Tensor, num_virtual_tokens: int, generator: torch.Generator | None = None
    ) -> PromptEmbedding:
        """Start as the embeddings of tokens drawn at random, with replacement."""
        ids = torch.randint(0, embedding_weight.shape[0], (num_virtual_tokens,), generator=generator)
        return cls.from_token_ids(ids.tolist(), embedding_weight)

    def prompt(self) -> torch.Tensor:
        """(P, hidden)."""
        return self.embedding.weight

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Take these as the prompt: what Hugging Face PEFT saves under this name."""
        _fold_into(self, prompt_embeddings)

    def forward(self, input_ids: torch.Tensor, embedding_weight: torch.Tensor) -> torch.Tensor:
        """input_ids (B, L), embedding_weight (V, hidden) -> (B, P + L, hidden)."""
        return prompt_embedding(input_ids, embedding_weight, self.prompt())


class PromptEncoder(PromptEmbedding):
    """P-tuning: the prompt is a small network's output, h = MLP(e) or h = MLP(LSTM(e)) of P learned e (P, hidden).

    `fold` leaves the prompt alone, once trained. Parameters are named as in Hugging Face PEFT's PromptEncoder
    (`embedding`, `lstm_head`, `mlp_head`), and its state dict loads here. Source: arXiv:2103.10385, equation 1.

    Args:
        num_virtual_tokens: P. hidden: the width of the model. encoder_hidden_size: the network's, default `hidden`.
        reparameterization: "MLP" (three layers) or "LSTM" (bidirectional, then two layers).
        num_layers, dropout: of the LSTM.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden: int,
        *,
        encoder_hidden_size: int | None = None,
        reparameterization: str = "MLP",
        num_layers: int = 2,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_virtual_tokens, hidden, device=device, dtype=dtype)
        width = encoder_hidden_size or hidden
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if reparameterization == "MLP":
            sizes: tuple[int, ...] = (hidden, width, width, hidden)
        elif reparameterization == "LSTM":
            self.lstm_head = nn.LSTM(
                hidden, width, num_layers, dropout=dropout, bidirectional=True, batch_first=True, **options
            )
            sizes = (2 * width, 2 * width, hidden)
        else:
            raise bad_value("reparameterization", '"MLP" or "LSTM"', repr(reparameterization), "Choose one.")
        self.mlp_head = _mlp(sizes, nn.ReLU, options)

    def prompt(self) -> torch.Tensor:
        """(P, hidden), computed once, whatever the batch."""
        states = self.embedding.weight
        if hasattr(self, "lstm_head"):
            states = self.lstm_head(states[None])[0][0]
        return self.mlp_head(states) if hasattr(self, "mlp_head") else states

    def fold(self) -> PromptEncoder:
        """Compute the prompt once more, without dropout, keep it as `embedding.weight` and drop the network."""
        _fold_into(self, _without_dropout(self))
        return self


class PrefixEncoder(nn.Module):
    """Deep prompts: a learned key and value prefix for every layer, from P-tuning v2 and prefix-tuning.

    Without a projection `embedding.weight` (P, layers * 2 * Hkv * D) holds the prefixes; with one it is (P, Hkv * D)
    and `transform`, a two-layer tanh MLP, makes them, until `fold` keeps its result and drops it. Named as in Hugging
    Face PEFT's PrefixEncoder, and its state dict loads here. Source: arXiv:2110.07602, section 3; arXiv:2101.00190,
    equation 3 and its reparameterization.

    Args:
        num_virtual_tokens: P. num_layers, num_kv_heads, head_dim: of the model.
        encoder_hidden_size: the projection's hidden width, or None for no projection.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        encoder_hidden_size: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_virtual_tokens(num_virtual_tokens)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        width, total = num_kv_heads * head_dim, num_layers * 2 * num_kv_heads * head_dim
        projected = encoder_hidden_size is not None
        self.embedding = nn.Embedding(num_virtual_tokens, width if projected else total, **options)
        if encoder_hidden_size is not None:
            self.transform = _mlp((width, encoder_hidden_size, total), nn.Tanh, options)

    def prompt(self) -> torch.Tensor:
        """(P, layers * 2 * Hkv * D), computed once, whatever the batch."""
        states = self.embedding.weight
        return self.transform(states) if hasattr(self, "transform") else states

    def forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer its prefix_k and prefix_v (Hkv, P, D), as `peft_kernels.functional.prefix_attention` takes."""
        return split_prefix(self.prompt(), self.num_layers, self.num_kv_heads)

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Take these as the prefixes: what Hugging Face PEFT saves under this name."""
        _fold_into(self, prompt_embeddings)

    def fold(self) -> PrefixEncoder:
        """Compute the prefixes once more, keep them as `embedding.weight` and drop the projection."""
        _fold_into(self, _without_dropout(self))
        return self


def split_prefix(prompt: torch.Tensor, num_layers: int, num_kv_heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(P, layers * 2 * Hkv * D) -> for each layer prefix_k and prefix_v (Hkv, P, D): views of one copy."""
    parts = prompt.view(prompt.shape[0], num_layers, 2, num_kv_heads, -1).permute(1, 2, 3, 0, 4).contiguous()
    keys, values = parts.unbind(1)
    return list(zip(keys.unbind(0), values.unbind(0), strict=True))


def _mlp(sizes: tuple[int, ...], activation: type[nn.Module], options: dict[str, Any]) -> nn.Sequential:
    """Linear layers of these sizes with an activation between each two."""
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1], **options)]
    for i in range(1, len(sizes) - 1):
        layers += [activation(), nn.Linear(sizes[i], sizes[i + 1], **options)]
    return nn.Sequential(*layers)


@torch.no_grad()
def _without_dropout(encoder: PromptEncoder | PrefixEncoder) -> torch.Tensor:
    was_training = encoder.training
    try:
        return encoder.eval().prompt()
    finally:
        encoder.train(was_training)


@torch.no_grad()
def _fold_into(encoder: PromptEmbedding | PrefixEncoder, prompt: torch.Tensor) -> None:
    """Make `prompt` the encoder's embedding, in the embedding's dtype and place, and drop the network that made it."""
    weight = encoder.embedding.weight
    heads = [name for name in ("lstm_head", "mlp_head", "transform") if hasattr(encoder, name)]
    width = getattr(encoder, heads[-1])[-1].out_features if heads else weight.shape[1]
    if tuple(prompt.shape) != (weight.shape[0], width):
        remedy = "Give the encoder the checkpoint's number of virtual tokens and sizes."
        raise bad_value("prompt_embeddings", f"shape {(weight.shape[0], width)}", tuple(prompt.shape), remedy)
    for name in heads:
        delattr(encoder, name)
    encoder.embedding = nn.Embedding.from_pretrained(prompt.to(weight).clone(), freeze=not weight.requires_grad)
