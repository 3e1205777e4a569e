"""Where the fused kernel wins over a decode and the vendor's GEMM, by the number of rows: rows for a dispatcher.

Each way is forced for the same call, checked like every contender, and measured interleaved with the other.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import peft_kernels as pk

from .case import Case, Options, Training, Work, checked
from .inputs import nf4_weight
from .shapes import RANK

FUSED, DECODE = "fused", "decode + GEMM"
PHASES = ("forward", "backward")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_ROWS = (1, 64)
# The module whose function decides, and that function for each pass. The operations ask it at each call.
DECIDES = {
    "cpu": ("peft_kernels.ops.linear_4bit.native_calls", ("fused_forward", "fused_backward")),
    "gpu": ("peft_kernels.ops.linear_4bit.triton_kernels", ("fused",)),
}


@contextlib.contextmanager
def forced(way: str, device: torch.device) -> Iterator[None]:
    """Every call inside goes that way; the CPU's fused kernels still say themselves what they support."""
    name, functions = DECIDES["cpu" if device.type == "cpu" else "gpu"]
    module = importlib.import_module(name)
    before = {function: getattr(module, function) for function in functions}
    try:
        for function in functions:
            if way == DECODE:
                setattr(module, function, lambda *arguments: False)
            elif device.type != "cpu":
                setattr(module, function, lambda *arguments: True)
        yield
    finally:
        for function, original in before.items():
            setattr(module, function, original)


def supported(m: int, dtype: torch.dtype, weight: pk.Weight4bit, device: torch.device) -> bool:
    """Whether there is a fused kernel for both passes at m rows."""
    if device.type != "cpu":
        return dtype != torch.float32
    module = importlib.import_module(DECIDES["cpu"][0])
    return all(getattr(module, function)(m, dtype, weight) for function in DECIDES["cpu"][1])


def work(op: str, options: Options, m: int, n: int, k: int) -> Work:
    """Forward and backward of `op` at m rows, each way."""
    torch.manual_seed(0)
    _, weight = nf4_weight(options, n, k)
    x, dy = options.randn(m, k, grad=True), options.randn(m, n)
    leaves = {"dx": x}
    if op == "lora_linear":
        leaves |= {"dA": options.randn(RANK, k, grad=True), "dB": options.randn(n, RANK, grad=True)}

    def training(function: Callable[..., torch.Tensor], leaves: dict[str, torch.Tensor], dy: torch.Tensor, **more: Any):
        x, *adapters = leaves.values()
        return Training(lambda: function(x, weight, *adapters), leaves, dy, **more)

    def truth() -> dict[str, torch.Tensor]:
        doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        return training(getattr(pk.reference, op), doubles, dy.double())()

    made = checked(truth, lambda: training(getattr(pk.reference, op), leaves, dy)())
    for way in (FUSED, DECODE):
        why_not = None if way == DECODE or supported(m, options.dtype, weight, options.device) else "no kernel"
        around = partial(forced, way, options.device)
        make = partial(training, getattr(pk.functional, op), leaves, dy, around=around)
        made.add(way, "ours", make, why_not)
    return made


OPS = ("linear_4bit", "lora_linear")


def cases(op: str, options: Options) -> Iterator[Case]:
    """One case for each layer and number of rows."""
    for layer in options.layers():
        for m in QUICK_ROWS if options.quick else ROWS:
            facts = {"M": m, "N": layer.n, "K": layer.k}
            yield Case(f"{layer}, M={m}", op, facts, partial(work, op, options, m, layer.n, layer.k))


def times(record: dict[str, Any], phase: str) -> dict[str, float]:
    """Way -> p50 of a pass, of the ways that passed their check."""
    return {row["contender"]: row["phases"][phase]["p50"] for row in record["rows"] if phase in row.get("phases", {})}


def named_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """What the dispatcher's table should hold: for each layer and pass the most rows up to which fused wins."""
    shapes = dict.fromkeys((record["shape"]["N"], record["shape"]["K"]) for record in records)
    for n, k in shapes:
        own = [record for record in records if (record["shape"]["N"], record["shape"]["K"]) == (n, k)]
        for phase in PHASES:
            won: list[tuple[int, float]] = []
            for record in own:
                found = times(record, phase)
                if len(found) < 2 or found[FUSED] > found[DECODE]:
                    break
                won.append((record["shape"]["M"], found[DECODE] / found[FUSED]))
            gains = ", ".join(f"{gain:.2f} x at M={m}" for m, gain in won)
            most = won[-1][0] if won else 0
            yield f'"{phase} {n}x{k}": {most},  # {gains or "decode + GEMM is faster, or alone, from M=1 on"}'
