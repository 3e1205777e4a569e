"""IA³, BitFit and LLaMA-Adapter V2's scale and bias over NF4: forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Case, Goal, Options, Training, Work, checked, dtype_name
from ..inputs import compiled, nf4_weight, replaced, unchanged
from ..peers import bnb, peft_bnb

CPU_ROWS, GPU_ROWS = (512,), (512, 8192)
FROZEN = "ours, nothing trained"  # the floor: linear_4bit, forward and dX
PEERS = {"ia3": peft_bnb, "ia3 feed-forward": peft_bnb, "bitfit": bnb, "scale-bias": bnb}


def cases(options: Options) -> Iterator[Case]:
    """IA³ (output and input scaling), BitFit, scale and bias: forward and backward over a frozen NF4 weight."""
    for layer in options.layers():
        for method, peer in PEERS.items():
            for m in options.rows(CPU_ROWS, GPU_ROWS):
                facts = {"M": m, "N": layer.n, "K": layer.k, "x": dtype_name(options.dtype), "weight": "nested NF4"}
                goals = (Goal(FUNCTIONAL, FROZEN, at_most=1.03),)
                if options.judged(layer):
                    goals = (Goal(peer.NAME, OURS, at_least=1.4), *goals)
                elif options.device.type == "cpu" or m < max(GPU_ROWS):
                    goals = ()
                work = partial(train, options, method, m, layer.n, layer.k)
                yield Case(f"{layer} {method}, M={m}", "forward + backward", facts, work, goals)


def train(options: Options, method: str, m: int, n: int, k: int) -> Work:
    """Forward and backward; dX and the gradients of all that the method trains are computed."""
    torch.manual_seed(0)
    base, weight = nf4_weight(options, n, k)
    x, dy = options.randn(m, k, grad=True), options.randn(m, n)
    feedforward = method == "ia3 feed-forward"
    shape = {"ia3": (n, 1), "ia3 feed-forward": (1, k), "scale-bias": (n,)}.get(method)
    scale = None if shape is None else (1 + options.randn(*shape, dtype=torch.float32) / 4).requires_grad_()
    bias = None if method.startswith("ia3") else options.randn(n, grad=True)

    def call(namespace: Any, x: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
        if method == "bitfit":
            return namespace.bitfit_linear(x, weight, bias)
        if method == "scale-bias":
            return namespace.scale_bias_linear(x, weight, scale, bias)
        return namespace.ia3_linear(x, weight, scale, is_feedforward=feedforward)

    def training(namespace: Any, cast: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Training:
        given = {"dx": x, "dscale": scale, "dbias": bias}
        leaves = {name: cast(t.detach()).requires_grad_() for name, t in given.items() if t is not None}
        inputs = (leaves["dx"], leaves.get("dscale"), leaves.get("dbias"))
        return Training(lambda: call(namespace, *inputs), leaves, cast(dy))

    def module(
        wrap: Callable[[torch.nn.Module], torch.nn.Module], compile: Callable[[Any], Any] = unchanged
    ) -> Training:
        model, leaves = layer_of(method, copy.deepcopy(base), scale, bias, feedforward)
        run = compile(wrap(model).proj)
        # PEFT's 4-bit layer returns float32: for either, the next layer of a model in x's dtype casts
        return Training(lambda: run(x).to(x.dtype), {"dx": x, **leaves}, dy)

    def frozen() -> Training:
        return Training(lambda: pk.functional.linear_4bit(x, weight), {"dx": x}, dy)

    peer = PEERS[method]
    work = checked(lambda: training(pk.reference, torch.Tensor.double)(), lambda: training(pk.reference)())
    work.add(OURS, "ours", lambda: module(replaced), peer.why_not())
    work.add(FUNCTIONAL, "ours", lambda: training(pk.functional))
    work.add(peer.NAME, "peer", lambda: module(unchanged), peer.why_not())
    slow = options.why_not_compiled()
    work.add(f"{peer.NAME}, compiled", "peer", lambda: module(unchanged, compiled), slow or peer.why_not())
    work.add(FROZEN, "floor", frozen)
    work.notes.append(f"{FROZEN}: forward + dX of linear_4bit")
    return work


def layer_of(method: str, base: Any, scale: Any, bias: Any, feedforward: bool) -> tuple[torch.nn.Sequential, dict]:
    """A model of one layer "proj" as the method's users have it, and the leaves that it trains."""
    if method.startswith("ia3"):
        model = peft_bnb.ia3_layer(base, scale, feedforward)
        return model, {"dscale": model.proj.ia3_l["default"]}
    model = torch.nn.Sequential()
    model.proj = base
    model.proj.bias = torch.nn.Parameter(bias.detach().clone())
    if method == "bitfit":
        pk.prepare_bitfit(model)
        return model, {"dbias": model.proj.bias}
    pk.prepare_scale_bias(model)
    model.proj.scale.data = scale.detach().clone()
    return model, {"dscale": model.proj.scale, "dbias": model.proj.bias}
