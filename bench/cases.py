"""The benchmark cases, as data: a name, a shape, the work, and the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import smollm2, work
from .shapes import QUICK, RANK, SHAPES
from .work import BNB, DENSE, OURS, PEFT_BNB, STREAM, Work


@dataclass(frozen=True)
class Goal:
    """A bar on `over` / `under`, a ratio of times or of another measure."""

    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None
    measure: str = "time"


@dataclass(frozen=True)
class Case:
    """One row of a benchmark; nothing is allocated before build()."""

    name: str
    op: str
    shape: dict[str, Any]
    build: Callable[[], Work]
    goals: tuple[Goal, ...] = ()


# Goals on the shape "cpu-bar", from 2 cores with AVX512-BF16: rows -> peer time / our time.
LORA_GOALS = {16: 6.0, 64: 2.8, 256: 1.5, 1024: 1.18}
INFERENCE_GOALS = {1: 2.5, 4: 2.0, 16: 1.6, 64: 1.3, 256: 1.3, 1024: 1.3}
QUANTIZE_GOAL = 30.0
QUICK_ROWS = {"lora_linear": (16,), "linear_4bit": (1, 16)}


def layers(names: list[str] | None, quick: bool) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(label, shape, whether the goals apply) of each layer of the named models; by default the goals' own shape."""
    selected = {name: SHAPES[name] for name in names} if names else QUICK if quick else {"cpu-bar": SHAPES["cpu-bar"]}
    for model, shapes in selected.items():
        for layer, (n, k) in shapes.items():
            label = f"{n}x{k}" if len(shapes) == 1 else f"{model} {layer} {n}x{k}"
            yield label, {"N": n, "K": k}, model == "cpu-bar" and not quick


def lora_linear(names: list[str] | None, quick: bool) -> Iterator[Case]:
    """QLoRA layer, forward and backward, with PEFT's default float32 adapters and with bfloat16 ones."""
    for label, shape, judged in layers(names, quick):
        for dtype in (torch.float32, torch.bfloat16):
            for m in QUICK_ROWS["lora_linear"] if quick else LORA_GOALS:
                # the goals against the peer are set on its default, float32 adapters
                goals = [Goal(PEFT_BNB, OURS, at_least=LORA_GOALS[m])] if dtype == torch.float32 else []
                goals += [Goal(OURS, DENSE, at_most=1.12)] if m >= 64 else []
                adapters = str(dtype).removeprefix("torch.")
                facts = {"M": m, **shape, "r": RANK, "x": "bfloat16", "adapters": adapters, "weight": "nested NF4"}
                build = partial(work.lora_train, m, shape["N"], shape["K"], RANK, dtype)
                name = f"{label} r={RANK}, {adapters} adapters, M={m}"
                yield Case(name, "forward + backward", facts, build, tuple(goals) if judged else ())


def linear_4bit(names: list[str] | None, quick: bool) -> Iterator[Case]:
    """4-bit linear layer, inference."""
    for label, shape, judged in layers(names, quick):
        for m, goal in INFERENCE_GOALS.items():
            if quick and m not in QUICK_ROWS["linear_4bit"]:
                continue
            goals = [Goal(BNB, OURS, at_least=goal)]
            goals += [Goal(STREAM, OURS, at_least=0.6)] if m == 1 else []
            goals += [Goal(OURS, DENSE, at_most=1.0)] if m >= 16 else []
            facts = {"M": m, **shape, "x": "bfloat16", "weight": "nested NF4"}
            build = partial(work.inference, m, shape["N"], shape["K"], cold=not quick)
            yield Case(f"{label}, M={m}", "inference", facts, build, tuple(goals) if judged else ())


def codec(names: list[str] | None, quick: bool) -> Iterator[Case]:
    """Quantize and dequantize."""
    for label, shape, judged in layers(names, quick):
        facts = {**shape, "dtype": "bfloat16", "weight": "nested NF4"}
        goals = (Goal(BNB, OURS, at_least=QUANTIZE_GOAL),) if judged else ()
        yield Case(f"quantize {label}", "quantize", facts, partial(work.quantize, shape["N"], shape["K"]), goals)
        yield Case(f"dequantize {label}", "dequantize", facts, partial(work.dequantize, shape["N"], shape["K"]))


def smollm2_step(names: list[str] | None, quick: bool) -> Iterator[Case]:
    """A QLoRA training step of SmolLM2-135M: forward, backward, AdamW."""
    seq, batch, steps = (32, 1, 3) if quick else (256, 4, 10)
    goals = (
        Goal(OURS, smollm2.FLOOR, at_most=1.12),
        Goal(PEFT_BNB, OURS, at_least=1.25),
        Goal(OURS, PEFT_BNB, at_most=1.0, measure="peak memory"),
    )
    facts = {"sequence": seq, "batch": batch, "r": RANK, "x": "bfloat16", "adapters": "float32", "weight": "nested NF4"}
    name = f"SmolLM2-135M, all linear layers, {batch}x{seq} tokens"
    yield Case(name, "training step", facts, partial(smollm2.training_step, seq, batch, steps), () if quick else goals)


GROUPS: dict[str, Callable[[list[str] | None, bool], Iterator[Case]]] = {
    "lora_linear": lora_linear,
    "linear_4bit": linear_4bit,
    "codec": codec,
    "smollm2_step": smollm2_step,
}
