"""QLoRA layer: forward and backward of NF4 + LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Call, Case, Goal, Options, Training, Work, checked, dtype_name, without_grad
from ..inputs import nf4_bytes, nf4_weight, replaced, unchanged
from ..peers import dense, lorafusion, peft_bnb, unsloth, unsloth_order
from ..shapes import RANK, Layer

# Rows -> peer time / our time on 2 cores with AVX512-BF16, with PEFT's default float32 adapters.
CPU_GOALS = {16: 6.0, 64: 2.8, 256: 1.5, 1024: 1.18}
GPU_ROWS, GPU_INFERENCE_ROWS = (512, 2048, 8192), (1, 4, 16, 32, 64, 256)
WITHOUT = "ours, no adapter"
GPU_GOALS = (  # 8192 rows, on H100
    Goal(OURS, dense.NAME, at_most=1.15),
    Goal(unsloth_order.NAME, OURS, at_least=1.2),
    Goal(peft_bnb.NAME, OURS, at_least=1.6),
    Goal(OURS, peft_bnb.NAME, at_most=0.6, measure="peak memory"),
)


def cases(options: Options) -> Iterator[Case]:
    """QLoRA layer, forward and backward, with PEFT's default float32 adapters and with those of the input's dtype."""
    for layer in options.layers():
        for adapters in dict.fromkeys((torch.float32, options.dtype)):
            for m in options.rows(tuple(CPU_GOALS), GPU_ROWS):
                facts = {"M": m, "N": layer.n, "K": layer.k, "r": RANK, "x": dtype_name(options.dtype)}
                facts |= {"adapters": dtype_name(adapters), "weight": "nested NF4"}
                work = partial(train, options, m, layer.n, layer.k, RANK, adapters)
                name = f"{layer} r={RANK}, {facts['adapters']} adapters, M={m}"
                # x W^T and dY W; the adapters' products are three each way
                flops = 4 * m * layer.n * layer.k + 6 * m * RANK * (layer.n + layer.k)
                nbytes = 2 * nf4_bytes(layer.n, layer.k) + 2 * options.dtype.itemsize * m * (layer.n + layer.k)
                judged = goals(options, layer, m, adapters)
                yield Case(name, "forward + backward", facts, work, judged, flops, nbytes)
        if options.device.type != "cpu":
            yield from inference_cases(options, layer)


def inference_cases(options: Options, layer: Layer) -> Iterator[Case]:
    """Decoding and small batches, on a GPU, where an adapter may cost little beside a weight that is read anyway."""
    for m in options.rows((), GPU_INFERENCE_ROWS):
        facts = {"M": m, "N": layer.n, "K": layer.k, "r": RANK, "x": dtype_name(options.dtype)}
        facts |= {"adapters": "float32", "weight": "nested NF4"}
        work = partial(inference, options, m, layer.n, layer.k, RANK)
        bars: tuple[Goal, ...] = (Goal(peft_bnb.NAME, OURS, at_least=1.5 if m == 16 else 1.0),)
        if m <= 16 and (layer.n, layer.k) == (14336, 4096):
            bars += (Goal(dense.STREAM, OURS, at_least=0.7), Goal(OURS, WITHOUT, at_most=1.08))
        flops = 2 * m * layer.n * layer.k + 2 * m * RANK * (layer.n + layer.k)
        nbytes = nf4_bytes(layer.n, layer.k) + 4 * RANK * (layer.n + layer.k)
        nbytes += options.dtype.itemsize * m * (layer.n + layer.k)
        yield Case(f"{layer} r={RANK}, inference, M={m}", "inference", facts, work, bars, flops, nbytes)


def goals(options: Options, layer: Layer, m: int, adapters: torch.dtype) -> tuple[Goal, ...]:
    """The goals for M rows; on the CPU those against the peer are set on its default, float32 adapters."""
    if options.device.type != "cpu":
        return GPU_GOALS if m == max(GPU_ROWS) else ()
    if not options.judged(layer):
        return ()
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

    def compiled() -> list[Call]:  # not apart: a compiled backward pass frees what a second one would need
        def wrap(model: torch.nn.Module) -> torch.nn.Module:
            model.proj.compile(dynamic=False)
            return model

        return [module(wrap)]

    def peer(function: Callable[..., torch.Tensor], weight: Any) -> Training:
        return Training(lambda: function(x, weight, lora_A, lora_B, scaling), {"dx": x, "dA": lora_A, "dB": lora_B}, dy)

    def floor() -> list[Call]:
        dense_weight, rows = weight.dequantize(), x.detach()
        return [lambda: (F.linear(rows, dense_weight), dy @ dense_weight)]

    work = checked(lambda: reference()(), lambda: training(pk.reference.lora_linear, x, lora_A, lora_B)())
    work.add(OURS, "ours", lambda: module(replaced), peft_bnb.why_not())
    work.add(FUNCTIONAL, "ours", lambda: training(pk.functional.lora_linear, x, lora_A, lora_B))
    work.add(peft_bnb.NAME, "peer", lambda: module(unchanged), peft_bnb.why_not())
    work.add(peft_bnb.COMPILED, "peer", compiled, peft_bnb.why_not() or options.why_not_compiled())
    work.add(unsloth_order.NAME, "peer", lambda: peer(unsloth_order.lora_linear, base.weight), unsloth_order.why_not())
    work.add(unsloth.NAME, "peer", lambda: peer(unsloth.lora_linear, base.weight), unsloth.why_not(options.device))
    work.add(
        lorafusion.NAME,
        "peer",
        lambda: peer(lorafusion.lora_linear, weight.dequantize()),
        lorafusion.why_not(options.device),
    )
    work.add(dense.NAME, "floor", floor)
    work.notes.append("dense: forward + dX of the decoded base weight alone")
    return work


def inference(options: Options, m: int, n: int, k: int, r: int) -> Work:
    """Forward without gradients, with float32 adapters."""
    torch.manual_seed(0)
    base, weight = nf4_weight(options, n, k)
    x = options.randn(m, k)
    lora_A, lora_B = options.randn(r, k, dtype=torch.float32) / k**0.5, options.randn(n, r, dtype=torch.float32) * 0.1
    scaling = 2.0

    def functional(namespace: Any, x: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        return namespace.lora_linear(x, weight, *adapter, scaling=scaling)

    def module(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> list[Call]:
        layer = wrap(peft_bnb.lora_layer(copy.deepcopy(base), lora_A, lora_B, scaling * r)).proj.eval()
        return [without_grad(layer, x)]

    reads, reader = dense.stream(weight.nbytes, options.device)
    work = checked(
        lambda: {"y": functional(pk.reference, *(t.double() for t in (x, lora_A, lora_B)))},
        lambda: {"y": functional(pk.reference, x, lora_A, lora_B)},
    )
    work.add(OURS, "ours", lambda: module(replaced), peft_bnb.why_not())
    work.add(FUNCTIONAL, "ours", lambda: [without_grad(functional, pk.functional, x, lora_A, lora_B)])
    work.add(peft_bnb.NAME, "peer", lambda: module(unchanged), peft_bnb.why_not())
    work.add(WITHOUT, "floor", lambda: [without_grad(pk.functional.linear_4bit, x, weight)])
    if m <= 16:
        work.add(dense.STREAM, "floor", lambda: reads)
        work.notes.append(f"streaming read: {weight.nbytes} bytes, as many as the packed weight has, by {reader}")
    return work
