"""The NF4 codec: quantize and dequantize, with double quantization."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial

import torch

import peft_kernels as pk

from ..case import OURS, Call, Case, Goal, Options, Work, dtype_name
from ..inputs import nf4_bytes, nf4_weight
from ..peers import bnb

QUANTIZE_GOAL = 30.0  # bitsandbytes' time / our time, 2 cores with AVX-512


def cases(options: Options) -> Iterator[Case]:
    """Quantize and dequantize."""
    for layer in options.layers():
        facts = {"N": layer.n, "K": layer.k, "dtype": dtype_name(options.dtype), "weight": "nested NF4"}
        goals = (Goal(bnb.NAME, OURS, at_least=QUANTIZE_GOAL),) if options.judged(layer) else ()
        nbytes = nf4_bytes(layer.n, layer.k) + options.dtype.itemsize * layer.n * layer.k
        for name, work, judged in (("quantize", quantize, goals), ("dequantize", dequantize, ())):
            made = partial(work, options, layer.n, layer.k)
            yield Case(f"{name} {layer}", name, facts, made, judged, nbytes=nbytes)


def quantize(options: Options, n: int, k: int) -> Work:
    """NF4 with double quantization, from a dense weight."""
    torch.manual_seed(0)
    w = options.randn(n, k)

    @functools.cache
    def reference() -> pk.Weight4bit:
        with pk.use_backend("reference"):
            return pk.Weight4bit.quantize(w)

    def check(name: str) -> None:
        actual, truth = work.contenders[name].calls[0](), reference()
        actual = actual if isinstance(actual, pk.Weight4bit) else pk.Weight4bit.from_bnb(actual)
        codes = (actual.packed != truth.packed).double().mean().item()
        # bitsandbytes' GPU kernels may divide approximately: a value between two codes then falls to the other
        assert codes <= (0 if name == OURS or w.device.type == "cpu" else 1e-4), f"{codes:.2%} of the codes differ"
        differing = (actual.absmax != truth.absmax).double().mean().item()
        # bitsandbytes' CPU path bins the statistics: about 0.1 % of its codes are a neighbour of the nearest
        assert differing <= (0 if name == OURS else 0.01), f"{differing:.2%} of the absmax codes differ"
        for key in ("absmax2", "offset"):
            torch.testing.assert_close(getattr(actual.nested, key), getattr(truth.nested, key), rtol=1e-5, atol=0)

    work = Work(check)
    work.add(OURS, "ours", lambda: [lambda: pk.functional.quantize_4bit(w, double_quant=True)])
    work.add(bnb.NAME, "peer", lambda: [lambda: bnb.quantize(w)], bnb.why_not())
    return work


def dequantize(options: Options, n: int, k: int) -> Work:
    """Nested NF4 to a dense weight in a new tensor."""
    torch.manual_seed(0)
    _, weight = nf4_weight(options, n, k)

    @functools.cache
    def reference() -> torch.Tensor:
        with pk.use_backend("reference"):
            return weight.dequantize()

    def check(name: str) -> None:
        assert torch.equal(work.contenders[name].calls[0](), reference()), "not equal bit for bit"

    def peer() -> list[Call]:
        params = weight.to_bnb()
        return [lambda: bnb.dequantize(params.data, params.quant_state)]

    work = Work(check)
    work.add(OURS, "ours", lambda: [lambda: pk.functional.dequantize_4bit(weight)])
    work.add(bnb.NAME, "peer", peer, bnb.why_not())
    return work
