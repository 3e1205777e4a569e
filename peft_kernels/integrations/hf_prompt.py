"""Hugging Face PEFT's prefix-tuning, P-tuning and prompt tuning on `prefix_attention` and `prompt_embedding`.

Parameters, checkpoints and every method but the two that lay out the prompt are PEFT's own.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from peft import PeftType
from torch import nn

from .. import dispatch
from ..functional import prefix_attention, prompt_embedding
from ..ops.prompt_embedding.module import split_prefix
from .base_layer import hooked, overridden
from .replace import Undo
from .transformers import ATTENTION, BEFORE, PrefixCache

# The families whose attention layers hand the cache's keys to the attention function as they are (each has a test).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


class FusedPrompt:
    """What the model with the prompt overrides: the prefix that it hands to the layers."""

    @staticmethod
    def why_not(model: Any) -> str | None:
        """Why no call with the active adapter can be served, or None."""
        reason = overridden(model)
        if reason is not None:
            return f"its {reason}"
        peft_type = model.active_peft_config.peft_type
        if peft_type is PeftType.PREFIX_TUNING:
            return _why_no_prefix(model)
        if peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            if not isinstance(model, peft.PeftModelForCausalLM):
                return f"{peft_type.value} has a kernel in PeftModelForCausalLM only"
            return _why_no_embedding(model)
        return f"there is no kernel for {peft_type.value}"

    @staticmethod
    def _prepare(model: Any) -> list[Undo]:
        if model.active_peft_config.peft_type is not PeftType.PREFIX_TUNING:
            return []
        return take_attention(model.get_base_model().config)

    @staticmethod
    def _release(model: Any) -> None:
        release_attention(model.get_base_model().config)

    @staticmethod
    def _probe(model: Any) -> list:
        """The choice of the kernel for this model's dtype and device, on the smallest of inputs."""
        config, weight = model.active_peft_config, model.word_embeddings.weight
        if config.peft_type is PeftType.PREFIX_TUNING:
            q = torch.zeros(1, 1, 1, config.token_dim // config.num_attention_heads).to(weight)
            return dispatch.record(prefix_attention, q, q, q, q[0], q[0])
        ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        return dispatch.record(prompt_embedding, ids, weight.detach(), weight.detach()[:1].float())

    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """A cache with the prefix of every layer, made once whatever the batch; other prompts as PEFT has them."""
        config = self.active_peft_config
        if config.peft_type is not PeftType.PREFIX_TUNING or (reason := _why_no_prefix(self, ATTENTION)):
            if config.peft_type is PeftType.PREFIX_TUNING:
                dispatch.note(f"{type(self).__bases__[-1].__qualname__}: left to PEFT: {reason}")
            return super().get_prompt(batch_size, *args, **kwargs)  # type: ignore[misc]
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            # PEFT says so too, but only to a model that has it on beforehand
            raise ValueError(
                "prefix-tuning does not work with gradient checkpointing, whose layers drop the cache that carries the "
                "prefix. Call gradient_checkpointing_disable(), or set gradient_checkpointing=False in the trainer."
            )
        return PrefixCache(split_prefix(_prompt(self, config), config.num_layers, config.num_attention_heads))


class FusedPeftModelForCausalLM(FusedPrompt, peft.PeftModelForCausalLM):
    """`peft.PeftModelForCausalLM`."""

    def forward(  # type: ignore[override]
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """PEFT's forward; for prompt tuning and P-tuning, prompt and tokens are laid out by one kernel."""
        config = self.active_peft_config
        if config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            return super().forward(input_ids, attention_mask, inputs_embeds, labels, **kwargs)
        reason = _why_no_embedding(self) if inputs_embeds is None else "it was given inputs_embeds"
        if reason is not None or input_ids is None:
            reason = reason or "it was given no input_ids"
            dispatch.note(f"{type(self).__bases__[-1].__qualname__}: left to PEFT: {reason}")
            return super().forward(input_ids, attention_mask, inputs_embeds, labels, **kwargs)
        batch, tokens = input_ids.shape[0], config.num_virtual_tokens
        embedded = prompt_embedding(input_ids, self.word_embeddings.weight, _prompt(self, config))
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.new_ones(batch, tokens), attention_mask), dim=1)
        if labels is not None:
            labels = torch.cat((labels.new_full((batch, tokens), -100), labels), dim=1)
        kwargs.pop("task_ids", None)
        self._adjust_prompt_learning_kwargs(config, kwargs=kwargs)
        return self.base_model(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels, **kwargs)


class FusedPeftModelForSequenceClassification(FusedPrompt, peft.PeftModelForSequenceClassification):
    """`peft.PeftModelForSequenceClassification`."""


class FusedPeftModelForTokenClassification(FusedPrompt, peft.PeftModelForTokenClassification):
    """`peft.PeftModelForTokenClassification`."""


def _prompt(model: Any, config: Any) -> torch.Tensor:
    """What the active adapter's encoder makes of its virtual tokens, for one sample: (P, ...)."""
    encoder = model.prompt_encoder[model.active_adapter]
    weight = encoder.embedding.weight
    if config.inference_mode:
        prompt = weight
    else:
        tokens = model.prompt_tokens[model.active_adapter][: config.num_virtual_tokens]
        prompt = encoder(tokens[None].to(weight.device))[0]
    if config.peft_type is PeftType.PREFIX_TUNING and model.base_model_torch_dtype is not None:
        prompt = prompt.to(model.base_model_torch_dtype)
    return prompt


def _why_no_prefix(model: Any, *attention: str) -> str | None:
    """Why the prefix cannot stay apart from the cache, with one of these attention functions in force."""
    peft_config, base = model.active_peft_config, model.get_base_model()
    model_type = getattr(base.config, "model_type", "")
    if model_type not in FAMILIES:
        return f"prefix attention is not tested with {model_type or type(base).__name__} models"
    if peft_config.num_transformer_submodules != 1:
        return "an encoder-decoder has two caches"
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    return why_not_attention(base.config, *attention)


def _why_no_embedding(model: Any) -> str | None:
    """Why prompt and tokens cannot be laid out by the kernel, or None."""
    embedding = model.word_embeddings
    if not hasattr(model, "_adjust_prompt_learning_kwargs"):
        return "this version of PEFT prepares a model's arguments in another way"
    if type(embedding) is not nn.Embedding:
        return f"its word embeddings are a {type(embedding).__name__}"
    if hooked(embedding):
        return "its word embeddings have hooks"
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return "its word embeddings are renormalized, scaled or sparse"
    if embedding.weight.requires_grad and embedding.padding_idx is not None:
        return "its word embeddings are trained, but for their padding"
    if model.active_peft_config.num_transformer_submodules != 1:
        return "an encoder-decoder has two prompts"
    return None


def why_not_attention(config: Any, *accepted: str) -> str | None:
    """Why the model's attention function cannot be ours (or, where given, is not one of those), or None."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return f"the attention function needs transformers 5, this is {transformers.__version__}"
    name = config._attn_implementation
    if name in (accepted or (BEFORE, ATTENTION)):
        return None
    return f"its attention implementation is {name}; the kernel takes the place of {BEFORE}"


def take_attention(config: Any) -> list[Undo]:
    """Make ours the attention function of a model with this configuration; how to undo that."""
    if config._attn_implementation == ATTENTION:
        return []
    config._attn_implementation = ATTENTION
    return [lambda: release_attention(config)]


def release_attention(config: Any) -> None:
    """The attention function that the model had before."""
    if config._attn_implementation == ATTENTION:
        config._attn_implementation = BEFORE
