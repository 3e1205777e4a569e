"""4-bit linear layer: inference over NF4."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels import native
from peft_kernels.ops.linear_4bit import cuda_calls

from ..case import FUNCTIONAL, OURS, Call, Case, Goal, Options, Result, Work, checked, dtype_name, without_grad
from ..inputs import fresh, nf4_bytes, nf4_weight, replaced, unchanged
from ..peers import bnb, dense
from ..shapes import Layer
from ..timing import copies_beyond_cache

CPU_GOALS = {1: 2.5, 4: 2.0, 16: 1.6, 64: 1.3, 256: 1.3, 1024: 1.3}  # rows -> peer time / our time, 2 cores
CUDA = "ours, CUDA C++"
GPU_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)


def cases(options: Options) -> Iterator[Case]:
    """4-bit linear layer, inference."""
    for layer in options.layers():
        rows = options.rows(tuple(CPU_GOALS), GPU_ROWS)
        for m in (1, *rows) if options.quick else rows:
            facts = {"M": m, "N": layer.n, "K": layer.k, "x": dtype_name(options.dtype), "weight": "nested NF4"}
            work = partial(inference, options, m, layer.n, layer.k)
            nbytes = nf4_bytes(layer.n, layer.k) + options.dtype.itemsize * m * (layer.n + layer.k)
            flops = 2 * m * layer.n * layer.k
            yield Case(f"{layer}, M={m}", "inference", facts, work, goals(options, layer, m), flops, nbytes)


def goals(options: Options, layer: Layer, m: int) -> tuple[Goal, ...]:
    """The goals for M rows."""
    if options.device.type != "cpu":
        large = (Goal(dense.STREAM, OURS, at_least=0.7),) if m <= 16 and (layer.n, layer.k) == (14336, 4096) else ()
        return (Goal(bnb.NAME, OURS, at_least=1.5 if m == 16 else 1.0), *large)
    if not options.judged(layer):
        return ()
    floor = (Goal(OURS, dense.NAME, at_most=1.0),) if m >= 16 else ()
    floor += (Goal(dense.STREAM, OURS, at_least=0.6),) if m == 1 else ()
    return (Goal(bnb.NAME, OURS, at_least=CPU_GOALS[m]), *floor)


def inference(options: Options, m: int, n: int, k: int) -> Work:
    """Forward without gradients, over copies of the weight in turn unless quick, so that none is cached."""
    torch.manual_seed(0)
    base, weight = nf4_weight(options, n, k)
    x = options.randn(m, k)
    copies = 1 if options.quick or options.device.type != "cpu" else copies_beyond_cache(weight.nbytes)

    def modules(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> list[Call]:
        layers = [wrap(torch.nn.Sequential(copy.deepcopy(base)).eval())[0] for _ in range(copies)]
        return [without_grad(layer, x) for layer in layers]

    def function(weight: pk.Weight4bit) -> Call:
        return without_grad(pk.functional.linear_4bit, x, weight)

    def cuda(weight: pk.Weight4bit) -> Call:
        call = function(weight)

        def by_name() -> Result:
            with pk.use_backend("native"):
                return call()

        return by_name

    def floor() -> list[Call]:
        dense_weights = [weight.dequantize() for _ in range(copies)]
        return [functools.partial(F.linear, x, w) for w in dense_weights]

    work = checked(
        lambda: {"y": pk.reference.linear_4bit(x.double(), weight)}, lambda: {"y": pk.reference.linear_4bit(x, weight)}
    )
    work.add(OURS, "ours", lambda: modules(replaced), bnb.why_not())
    work.add(FUNCTIONAL, "ours", lambda: [function(fresh(weight)) for _ in range(copies)])
    if options.device.type == "cuda" and m <= cuda_calls.MOST_ROWS:
        absent = native.why_not_cuda(options.device, (options.dtype,))
        work.add(CUDA, "ours", lambda: [cuda(fresh(weight)) for _ in range(copies)], absent)
    work.add(bnb.NAME, "peer", lambda: modules(unchanged), bnb.why_not())
    work.add(dense.NAME, "floor", floor)
    if copies > 1:
        work.notes.append(f"{copies} copies of the weight in turn: {copies * weight.nbytes >> 20} MiB of 4-bit weights")
    if m == 1 or (options.device.type != "cpu" and m <= 16):
        calls, reader = dense.stream(weight.nbytes, options.device)
        work.add(dense.STREAM, "floor", lambda: calls)
        work.notes.append(f"streaming read: {weight.nbytes} bytes, as many as the packed weight has, by {reader}")
    return work
