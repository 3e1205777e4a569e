"""QLoRA layer: forward and backward of NF4 + LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Call, Case, Goal, Options, Training, Work, checked, dtype_name
from ..inputs import nf4_weight, replaced, unchanged
from ..peers import dense, peft_bnb
from ..shapes import RANK

# Rows -> peer time / our time on 2 cores with AVX512-BF16, with PEFT's default float32 adapters.
CPU_GOALS = {16: 6.0, 64: 2.8, 256: 1.5, 1024: 1.18}
GPU_ROWS = (512, 2048, 8192)


def cases(options: Options) -> Iterator[Case]:
    """QLoRA layer, forward and backward, with PEFT's default float32 adapters and with those of the input's dtype."""
    for layer in options.layers():
        for adapters in dict.fromkeys((torch.float32, options.dtype)):
            for m in options.rows(tuple(CPU_GOALS), GPU_ROWS):
                facts = {"M": m, "N": layer.n, "K": layer.k, "r": RANK, "x": dtype_name(options.dtype)}
                facts |= {"adapters": dtype_name(adapters), "weight": "nested NF4"}
                work = partial(train, options, m, layer.n, layer.k, RANK, adapters)
                name = f"{layer} r={RANK}, {facts['adapters']} adapters, M={m}"
                judged = goals(m, adapters) if options.judged(layer) else ()
                yield Case(name, "forward + backward", facts, work, judged)


def goals(m: int, adapters: torch.dtype) -> tuple[Goal, ...]:
    """The CPU goals for M rows; those against the peer are set on its default, float32 adapters."""
    peer = (Goal(peft_bnb.NAME, OURS, at_least=CPU_GOALS[m]),) if adapters == torch.float32 else ()
    return peer + ((Goal(OURS, dense.NAME, at_most=1.12),) if m >= 64 else ())


def train(options: Options, m: int, n: int, k: int, r: int, adapters: torch.dtype) -> Work:
    """Forward and backward; dX, dA and dB are all computed."""
    torch.manual_seed(0)
    base, weight = nf4_weight(options, n, k)
    x, dy = options.randn(m, k, grad=True), options.randn(m, n)
    lora_A = (options.randn(r, k, dtype=torch.float32) / k**0.5).to(adapters).requires_grad_()
    lora_B = (options.randn(n, r, dtype=torch.float32) * 0.1).to(adapters).requires_grad_()
    scaling = 2.0

    def training(function: Callable[..., torch.Tensor], x: Any, lora_A: Any, lora_B: Any, dy: Any = dy) -> Training:
        def forward() -> torch.Tensor:
            return function(x, weight, lora_A, lora_B, scaling=scaling)

        return Training(forward, {"dx": x, "dA": lora_A, "dB": lora_B}, dy)

    def reference() -> Training:
        inputs = [t.detach().double().requires_grad_() for t in (x, lora_A, lora_B)]
        return training(pk.reference.lora_linear, *inputs, dy.double())

    def module(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> Training:
        layer = wrap(peft_bnb.lora_layer(copy.deepcopy(base), lora_A, lora_B, scaling * r)).proj
        leaves = {"dx": x, "dA": layer.lora_A["default"].weight, "dB": layer.lora_B["default"].weight}
        return Training(lambda: layer(x), leaves, dy)

    def floor() -> list[Call]:
        dense_weight, rows = weight.dequantize(), x.detach()
        return [lambda: (F.linear(rows, dense_weight), dy @ dense_weight)]

    work = checked(lambda: reference()(), lambda: training(pk.reference.lora_linear, x, lora_A, lora_B)())
    work.add(OURS, "ours", lambda: module(replaced), peft_bnb.why_not())
    work.add(FUNCTIONAL, "ours", lambda: training(pk.functional.lora_linear, x, lora_A, lora_B))
    work.add(peft_bnb.NAME, "peer", lambda: module(unchanged), peft_bnb.why_not())
    work.add(dense.NAME, "floor", floor)
    work.notes.append("dense: forward + dX of the decoded base weight alone")
    return work
