"""Bottleneck adapters: forward and backward, with layer norm in front and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Case, Goal, Options, Training, Work, checked, dtype_name, without_grad
from ..inputs import bottleneck, compiled, replaced, unchanged
from ..peers import adapters_lib, dense, torch_adapter

EAGER, COMPILED, FLOOR = torch_adapter.NAME, f"{torch_adapter.NAME}, compiled", "its six GEMMs"
REPLACED = f"ours, in {adapters_lib.NAME}"  # the library's module after replace_layers
# (K, r), and on the CPU at M = 512 the least of eager / ours and the most of ours / floor: with layer norm, without
SIZES = {(4096, 64): ((1.8, 1.25), (1.35, 1.1)), (768, 48): ((1.6, 1.3), (1.3, 1.3))}
QUICK = {(64, 8): ((0.0, 0.0), (0.0, 0.0))}
CPU_ROWS, GPU_ROWS = (512, 4096), (8192,)
SCALING = 2.0


def cases(options: Options) -> Iterator[Case]:
    """With layer norm and without, for each size and number of rows."""
    for (k, r), goals in (QUICK if options.quick else SIZES).items():
        for norm, (ratio, floor) in zip((True, False), goals, strict=True):
            for m in options.rows(CPU_ROWS, GPU_ROWS):
                facts = {"M": m, "K": k, "r": r, "x": dtype_name(options.dtype), "layer norm": norm}
                name = f"{k} r={r}{', layer norm' if norm else ''}, M={m}"
                bars: tuple[Goal, ...] = ()
                if options.device.type == "cpu" and not options.quick and m == 512:
                    bars = (Goal(EAGER, OURS, at_least=ratio), Goal(OURS, FLOOR, at_most=floor))
                elif options.device.type == "cpu" and not options.quick:
                    bars = (Goal(EAGER, OURS, at_least=2.0, measure="peak memory"),)
                yield Case(name, "forward + backward", facts, partial(train, options, m, k, r, norm), bars)
                if options.device.type != "cpu":
                    bars = (Goal(EAGER, OURS, at_least=3.0), Goal(dense.STREAM, OURS, at_least=0.75))
                    work = partial(inference, options, m, k, r, norm)
                    yield Case(f"{name}, forward", "forward", facts, work, bars if r == 64 else ())


def inference(options: Options, m: int, k: int, r: int, norm: bool) -> Work:
    """Forward without gradients, beside a copy of x: as many bytes as it has to move, but for the weights."""
    torch.manual_seed(0)
    eager = torch_adapter.Adapter(k, r, norm=norm, scaling=SCALING).to(options.device, options.dtype)
    layer, exact, x = bottleneck(eager), copy.deepcopy(eager).double(), options.randn(m, k)
    reads, reader = dense.stream(2 * x.nbytes, options.device)

    work = checked(without_grad(exact, x.double()), without_grad(eager, x))
    work.add(OURS, "ours", lambda: [without_grad(layer, x)])
    work.add(EAGER, "peer", lambda: [without_grad(eager, x)])
    work.add(dense.STREAM, "floor", lambda: reads)
    work.notes.append(f"{dense.STREAM}: {2 * x.nbytes} bytes, x and y once, by {reader}")
    return work


def train(options: Options, m: int, k: int, r: int, norm: bool) -> Work:
    """Forward and backward; the gradients of x and of every parameter are computed."""
    torch.manual_seed(0)
    eager = torch_adapter.Adapter(k, r, norm=norm, scaling=SCALING).to(options.device, options.dtype)
    layer = bottleneck(eager)
    x, dy = options.randn(m, k, grad=True), options.randn(m, k)

    def training(module: torch.nn.Module, call: Any = None) -> Training:
        leaves = {"dx": x} | {f"d{name.replace('_before', '')}": p for name, p in module.named_parameters()}
        return Training(partial(module if call is None else call, x), leaves, dy)

    def function() -> Training:
        def call(x: torch.Tensor) -> torch.Tensor:
            weights = (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
            ln = {"ln_weight": layer.norm_before.weight, "ln_bias": layer.norm_before.bias} if norm else {}
            return pk.functional.bottleneck_adapter(x, *weights, scaling=SCALING, residual=x, **ln)

        return training(layer, call)

    def library(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> Training:
        weights = {name.replace("norm", "ln").replace(".", "_"): p for name, p in eager.named_parameters()}
        module = wrap(adapters_lib.adapter(**weights, scaling=SCALING, non_linearity="relu"))
        names = [f"d{name}" for name, _ in eager.named_parameters()]
        leaves = {"dx": x} | dict(zip(names, module.parameters(), strict=True))  # in the same order
        return Training(lambda: module(x, x)[0], leaves, dy)

    def exact() -> dict[str, torch.Tensor]:
        module = copy.deepcopy(eager).double()
        x64 = x.detach().double().requires_grad_()
        leaves = {"dx": x64} | {f"d{name}": p for name, p in module.named_parameters()}
        return Training(lambda: module(x64), leaves, dy.double())()

    def floor() -> list[Callable[[], Any]]:
        rows, hidden = x.detach(), options.randn(m, r)
        down, up = eager.down.weight.detach(), eager.up.weight.detach()
        products = ((rows, down.t()), (hidden, up.t()), (dy, up), (dy.t(), hidden), (hidden.t(), rows), (hidden, down))
        return [lambda: [left @ right for left, right in products]]

    work = checked(exact, lambda: training(eager)())
    work.add(OURS, "ours", lambda: training(layer))
    work.add(FUNCTIONAL, "ours", function)
    work.add(REPLACED, "ours", lambda: library(replaced), adapters_lib.why_not())
    work.add(EAGER, "peer", lambda: training(eager))
    work.add(adapters_lib.NAME, "peer", lambda: library(unchanged), adapters_lib.why_not())
    work.add(COMPILED, "peer", lambda: training(eager, compiled(eager)), options.why_not_compiled())
    work.add(FLOOR, "floor", floor)
    work.notes.append(f"{FLOOR}: by the vendor's library, with nothing between them")
    return work
