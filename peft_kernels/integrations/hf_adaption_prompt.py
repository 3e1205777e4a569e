"""Hugging Face PEFT's LLaMA-Adapter layers on `gated_prompt_attention`.

PEFT runs q_proj, v_proj and o_proj a second time on every token. Here the wrapped attention layer takes the prompt
along: o_proj is linear, so o_proj(attention) + o_proj(prompt's part) is o_proj of their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from torch import nn

from .. import dispatch
from ..functional import gated_prompt_attention
from .base_layer import overridden
from .hf_prompt import release_attention, take_attention, why_not_attention
from .replace import FOUR_BIT, Undo
from .trained_layers import ScaleBias
from .transformers import ATTENTION, GatedPrompt


class FusedAdaption:
    """What both kinds of adapted attention share."""

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why no call of this layer can be served, or None."""
        reason = overridden(layer) or overridden(layer.model)
        return f"its {reason}" if reason else why_not_attention(layer.model.config) or _why_not_output(layer.model)

    @staticmethod
    def _prepare(layer: Any) -> list[Undo]:
        return take_attention(layer.model.config)

    @staticmethod
    def _release(layer: Any) -> None:
        release_attention(layer.model.config)

    @staticmethod
    def _probe(layer: Any) -> list:
        """The choice of the kernel for this layer's dtype and device, on the smallest of inputs."""
        q = torch.zeros(1, 1, 1, layer.model.head_dim).to(layer.adaption_prompt)
        return dispatch.record(gated_prompt_attention, q, q, q, q[0], q[0], layer.adaption_gate.detach())

    def _left_to_peft(self: Any) -> bool:
        """Whether the model has got another attention function since."""
        reason = why_not_attention(self.model.config, ATTENTION)
        if reason is not None:
            dispatch.note(f"{type(self).__bases__[-1].__qualname__}: left to PEFT: {reason}")
        return reason is not None

    def _heads(self: Any, projected: torch.Tensor) -> torch.Tensor:
        """(1, P, Hkv * D) -> (Hkv, P, D)."""
        return projected.view(self.adapter_len, -1, self.model.head_dim).transpose(0, 1)


class FusedAdaptedAttention(FusedAdaption, AdaptedAttention):
    """`AdaptedAttention`, of Llama and Mistral."""

    def forward(self: Any, **kwargs: Any) -> tuple:
        """The wrapped attention with the gated prompt inside: q once, o_proj once."""
        if self._left_to_peft() or kwargs.get("output_attention", False):
            return super().forward(**kwargs)
        attention = self.model
        key, value = (self._heads(project(self.adaption_prompt)) for project in (attention.k_proj, attention.v_proj))
        output, *rest = attention(**kwargs, gated_prompt=GatedPrompt(key, value, self.adaption_gate))
        constant = _constant(attention.o_proj)
        if constant is not None:
            output = output + constant.to(output.dtype)  # PEFT's second o_proj adds it once more
        return output, *rest


class FusedAdaptedAttentionGPT(FusedAdaption, AdaptedAttentionGPT):
    """`AdaptedAttentionGPT`, of GPT-2, where PEFT adds the prompt's part after the output projection."""

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> tuple:
        """The wrapped attention, which leaves the gated prompt's part beside it: c_attn runs once."""
        crossed = kwargs.get("encoder_hidden_states") is not None
        if self._left_to_peft() or args or crossed:
            return super().forward(hidden_states, *args, **kwargs)
        attention = self.model
        _, key, value = attention.c_attn(self.adaption_prompt).split(attention.split_size, dim=2)
        prompt = GatedPrompt(self._heads(key), self._heads(value), self.adaption_gate, apart=True)
        output, *rest = attention(hidden_states, **kwargs, gated_prompt=prompt)
        assert prompt.output is not None
        part = prompt.output.transpose(1, 2).flatten(2)
        return (output + part).to(part.dtype), *rest


def _constant(project: Any) -> torch.Tensor | None:
    """What the output projection adds whatever its input."""
    bias = project.bias
    scaled = bias is not None and isinstance(project, ScaleBias)
    return bias * project.scale if scaled else bias


def _why_not_output(attention: Any) -> str | None:
    """Why the output projection may not be linear, or None."""
    project = getattr(attention, "o_proj", None)
    if project is None or type(project) is nn.Linear or type(project) in FOUR_BIT:
        return None
    if type(project).__module__ == ScaleBias.__module__:  # its bias, or a scale and a bias, are trained
        return None
    if f"{type(project).__module__}.{type(project).__qualname__}".startswith("bitsandbytes.nn.modules.Linear4bit"):
        return None
    return f"its o_proj is of class {type(project).__module__}.{type(project).__qualname__}, which may not be linear"
