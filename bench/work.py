"""The work of each case: who competes, and the check of the result that precedes every timing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget

from .peers import bnb, dense, missing, peft_bnb
from .timing import copies_beyond_cache

Result = dict[str, torch.Tensor]
Call = Callable[[], Any]

OURS, FUNCTIONAL, PEFT_BNB, BNB = "ours", "ours, functional", "peft + bitsandbytes", "bitsandbytes"
DENSE, STREAM = "dense", "streaming read"
PEER_TOLERANCE = 0.02  # a peer must compute the same function: its root-mean-square error, relative to the result


@dataclass
class Contender:
    """A way to do the work. calls: one, or the same on several copies of the weight; kind: "ours", "peer", "floor"."""

    calls: list[Call]
    kind: str


@dataclass
class Work:
    """A case made ready: who competes, who is absent and why, and the check that precedes every timing.

    check(name) makes the contender's call and raises AssertionError if the result is wrong. memory(name) is the peak
    in bytes, where it is measured.
    """

    contenders: dict[str, Contender]
    check: Callable[[str], None]
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory: Callable[[str], int | None] | None = None

    def add(self, name: str, kind: str, make: Callable[[], list[Call]], why_not: str | None = None) -> None:
        """Add the contender, or the reason for its absence."""
        try:
            if why_not is None:
                self.contenders[name] = Contender(make(), kind)
        except Exception as error:  # one contender that cannot be built must not hide the others
            why_not = f"{type(error).__name__}: {error}"
        if why_not is not None:
            self.absent[name] = why_not


def checked(reference: Callable[[], Result], eager: Callable[[], Result]) -> Work:
    """A Work without contenders whose check holds ours to the 2x rule on every tensor, and a peer to PEER_TOLERANCE."""
    reference, eager = functools.cache(reference), functools.cache(eager)

    def check(name: str) -> None:
        contender = work.contenders[name]
        actual = contender.calls[0]()
        if contender.kind == "floor":  # another, smaller computation by the vendor's library
            return
        for key, truth in reference().items():
            assert actual[key].abs().max() > 0, f"{key} is zero"
            if contender.kind == "ours":
                assert_within_budget(actual[key], truth, eager()[key], key)
            else:
                error = (actual[key].double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
                assert error <= PEER_TOLERANCE, f"{key}: relative error {error:.3g}"

    work = Work({}, check)
    return work


def weights(n: int, k: int) -> tuple[Any, pk.Weight4bit]:
    """The same quantized weight as a bitsandbytes layer (None without bitsandbytes) and as a Weight4bit."""
    w = torch.randn(n, k, dtype=torch.bfloat16) * 0.02
    if missing("bitsandbytes"):
        return None, pk.Weight4bit.quantize(w)
    layer = bnb.linear(w)
    return layer, pk.Weight4bit.from_bnb(layer.weight)


def replaced(model: torch.nn.Module) -> torch.nn.Module:
    """The model after replace_layers."""
    pk.replace_layers(model)
    return model


def lora_train(m: int, n: int, k: int, r: int, adapter_dtype: torch.dtype) -> Work:
    """Forward and backward of a QLoRA layer; dX, dA and dB are all computed."""
    torch.manual_seed(0)
    base, weight = weights(n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, dtype=torch.bfloat16)
    lora_A = (torch.randn(r, k) / k**0.5).to(adapter_dtype).requires_grad_()
    lora_B = (torch.randn(n, r) * 0.1).to(adapter_dtype).requires_grad_()
    scaling = 2.0

    def result(y: torch.Tensor, inputs: list[torch.Tensor], upstream: torch.Tensor = dy) -> Result:
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *torch.autograd.grad(y, inputs, upstream)), strict=True))

    def by(function: Callable[..., torch.Tensor]) -> Result:
        return result(function(x, weight, lora_A, lora_B, scaling=scaling), [x, lora_A, lora_B])

    def reference() -> Result:
        x64, a64, b64 = inputs = [t.detach().double().requires_grad_() for t in (x, lora_A, lora_B)]
        return result(pk.reference.lora_linear(x64, weight, a64, b64, scaling=scaling), inputs, dy.double())

    def module(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> list[Call]:
        model = wrap(peft_bnb.lora_layer(copy.deepcopy(base), lora_A, lora_B, scaling * r))
        inputs = [x, model.proj.lora_A["default"].weight, model.proj.lora_B["default"].weight]
        return [lambda: result(model.proj(x), inputs)]

    def floor() -> list[Call]:
        dense_weight, rows = weight.dequantize(), x.detach()
        return [lambda: (F.linear(rows, dense_weight), dy @ dense_weight)]

    work = checked(reference, lambda: by(pk.reference.lora_linear))
    work.add(OURS, "ours", lambda: module(replaced), missing("peft", "bitsandbytes"))
    work.add(FUNCTIONAL, "ours", lambda: [lambda: by(pk.functional.lora_linear)])
    work.add(PEFT_BNB, "peer", lambda: module(lambda model: model), missing("peft", "bitsandbytes"))
    work.add(DENSE, "floor", floor)
    work.notes.append("dense: forward + dX of the bfloat16 base weight alone")
    return work


def inference(m: int, n: int, k: int, *, cold: bool = True) -> Work:
    """Forward of a 4-bit linear layer without gradients; cold: copies of the weight in turn, so that none is cached."""
    torch.manual_seed(0)
    base, weight = weights(n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    copies = copies_beyond_cache(weight.nbytes) if cold else 1

    def modules(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> list[Call]:
        layers = [wrap(torch.nn.Sequential(copy.deepcopy(base)).eval())[0] for _ in range(copies)]
        return [functools.partial(without_grad, layer) for layer in layers]

    def without_grad(layer: Callable[[torch.Tensor], torch.Tensor]) -> Result:
        with torch.no_grad():
            return {"y": layer(x)}

    def function(weight: pk.Weight4bit) -> Call:
        return lambda: without_grad(lambda x: pk.functional.linear_4bit(x, weight))

    def floor() -> list[Call]:
        dense_weights = [weight.dequantize() for _ in range(copies)]
        return [functools.partial(F.linear, x, w) for w in dense_weights]

    def fresh(weight: pk.Weight4bit) -> pk.Weight4bit:
        return pk.Weight4bit.from_parts([part.clone() for part in weight.parts()], weight.meta())

    work = checked(
        lambda: {"y": pk.reference.linear_4bit(x.double(), weight)}, lambda: {"y": pk.reference.linear_4bit(x, weight)}
    )
    work.add(OURS, "ours", lambda: modules(replaced), missing("bitsandbytes"))
    work.add(FUNCTIONAL, "ours", lambda: [function(fresh(weight)) for _ in range(copies)])
    work.add(BNB, "peer", lambda: modules(lambda model: model), missing("bitsandbytes"))
    work.add(DENSE, "floor", floor)
    if cold:
        work.notes.append(f"{copies} copies of the weight in turn: {copies * weight.nbytes >> 20} MiB of 4-bit weights")
    if m == 1:
        calls, reader = dense.stream(weight.nbytes)
        work.add(STREAM, "floor", lambda: calls)
        work.notes.append(f"streaming read: {weight.nbytes} bytes, as many as the packed weight has, by {reader}")
    return work


def quantize(n: int, k: int) -> Work:
    """NF4 with double quantization, from bfloat16."""
    torch.manual_seed(0)
    w = torch.randn(n, k, dtype=torch.bfloat16)

    @functools.cache
    def reference() -> pk.Weight4bit:
        with pk.use_backend("reference"):
            return pk.Weight4bit.quantize(w)

    def check(name: str) -> None:
        actual, truth = work.contenders[name].calls[0](), reference()
        actual = actual if isinstance(actual, pk.Weight4bit) else pk.Weight4bit.from_bnb(actual)
        assert torch.equal(actual.packed, truth.packed), "the codes differ"
        differing = (actual.absmax != truth.absmax).double().mean().item()
        # bitsandbytes' CPU path bins the statistics: about 0.1 % of its codes are a neighbour of the nearest
        assert differing <= (0 if name == OURS else 0.01), f"{differing:.2%} of the absmax codes differ"
        for key in ("absmax2", "offset"):
            torch.testing.assert_close(getattr(actual.nested, key), getattr(truth.nested, key), rtol=1e-5, atol=0)

    work = Work({}, check)
    work.add(OURS, "ours", lambda: [lambda: pk.functional.quantize_4bit(w, double_quant=True)])
    work.add(BNB, "peer", lambda: [lambda: bnb.quantize(w)], missing("bitsandbytes"))
    return work


def dequantize(n: int, k: int) -> Work:
    """Nested NF4 to bfloat16, into a new tensor."""
    torch.manual_seed(0)
    _, weight = weights(n, k)

    @functools.cache
    def reference() -> torch.Tensor:
        with pk.use_backend("reference"):
            return weight.dequantize()

    def check(name: str) -> None:
        assert torch.equal(work.contenders[name].calls[0](), reference()), "not equal bit for bit"

    def peer() -> list[Call]:
        params = weight.to_bnb()
        return [lambda: bnb.dequantize(params.data, params.quant_state)]

    work = Work({}, check)
    work.add(OURS, "ours", lambda: [lambda: pk.functional.dequantize_4bit(weight)])
    work.add(BNB, "peer", peer, missing("bitsandbytes"))
    return work
