"""Bottleneck adapters: forward and backward, with layer norm in front and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Case, Goal, Options, Training, Work, checked, dtype_name

EAGER, COMPILED, FLOOR = "torch modules", "torch modules, compiled", "its six GEMMs"
# (K, r), and on the CPU at M = 512 the least of eager / ours and the most of ours / floor: with layer norm, without
SIZES = {(4096, 64): ((1.8, 1.25), (1.35, 1.1)), (768, 48): ((1.6, 1.3), (1.3, 1.3))}
QUICK = {(64, 8): ((0.0, 0.0), (0.0, 0.0))}
CPU_ROWS, GPU_ROWS = (512, 4096), (8192,)
SCALING = 2.0


class Eager(torch.nn.Module):
    """x + s up(relu(down([norm](x)))) of torch's own modules."""

    def __init__(self, k: int, r: int, norm: bool):
        super().__init__()
        self.norm = torch.nn.LayerNorm(k) if norm else torch.nn.Identity()
        self.down, self.up = torch.nn.Linear(k, r), torch.nn.Linear(r, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., K)."""
        return x + self.up(F.relu(self.down(self.norm(x)))) * SCALING


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


def train(options: Options, m: int, k: int, r: int, norm: bool) -> Work:
    """Forward and backward; the gradients of x and of every parameter are computed."""
    torch.manual_seed(0)
    eager = Eager(k, r, norm).to(options.device, options.dtype)
    layer = pk.nn.BottleneckAdapter(k, r, scaling=SCALING, norm_before=norm).to(options.device, options.dtype)
    layer.load_state_dict({key.replace("norm.", "norm_before."): value for key, value in eager.state_dict().items()})
    x, dy = options.randn(m, k, grad=True), options.randn(m, k)

    def training(module: torch.nn.Module, call: Any = None) -> Training:
        leaves = {"dx": x} | {f"d{name.replace('_before', '')}": p for name, p in module.named_parameters()}
        return Training(lambda: (call or module)(x), leaves, dy)

    def function() -> Training:
        def call(x: torch.Tensor) -> torch.Tensor:
            weights = (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
            ln = {"ln_weight": layer.norm_before.weight, "ln_bias": layer.norm_before.bias} if norm else {}
            return pk.functional.bottleneck_adapter(x, *weights, scaling=SCALING, residual=x, **ln)

        return training(layer, call)

    def exact() -> dict[str, torch.Tensor]:
        module = copy.deepcopy(eager).double()
        x64 = x.detach().double().requires_grad_()
        leaves = {"dx": x64} | {f"d{name}": p for name, p in module.named_parameters()}
        return Training(lambda: module(x64), leaves, dy.double())()

    def compiled() -> Training:
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
        return training(eager, torch.compile(eager))

    def floor() -> list[Callable[[], Any]]:
        rows, hidden = x.detach(), options.randn(m, r)
        down, up = eager.down.weight.detach(), eager.up.weight.detach()
        products = ((rows, down.t()), (hidden, up.t()), (dy, up), (dy.t(), hidden), (hidden.t(), rows), (hidden, down))
        return [lambda: [left @ right for left, right in products]]

    work = checked(exact, lambda: training(eager)())
    work.add(OURS, "ours", lambda: training(layer))
    work.add(FUNCTIONAL, "ours", function)
    work.add(EAGER, "peer", lambda: training(eager))
    slow = "not in a quick run: compiling takes longer than it" if options.quick else None
    work.add(COMPILED, "peer", compiled, slow)
    work.add(FLOOR, "floor", floor)
    work.notes.append(f"{FLOOR}: by the vendor's library, with nothing between them")
    return work
