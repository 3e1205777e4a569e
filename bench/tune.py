"""Where our own kernel wins over the vendor's library, by size: rows for a dispatcher's table.

Each way is forced for the same call, checked like every contender, and measured interleaved with the other.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import peft_kernels as pk
from peft_kernels import native

from .case import Case, Options, Training, Work, checked
from .cases import prompt_attention
from .inputs import nf4_weight
from .shapes import RANK

PHASES = ("forward", "backward")
BACKENDS = {"cpu": "native", "gpu": "triton"}
Sizes = dict[str, int]
# call(namespace, leaves...) -> y, with the leaves by the names of their gradients, and dY
Problem = tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """What an operation's dispatcher decides by one size.

    ways: our kernel, and what it competes with. decides: for a kind of device, the module whose functions decide, which
    the operation asks at each call. size: the name of the size, values: those to measure (all, quick); others: the
    remaining sizes. problem(options, sizes) makes the tensors; supported(options, sizes): whether ours can run.
    """

    ways: tuple[str, str]
    decides: dict[str, tuple[str, tuple[str, ...]]]
    size: str
    values: tuple[tuple[int, ...], tuple[int, ...]]
    others: Callable[[Options], Iterator[Sizes]]
    problem: Callable[[Options, Sizes], Problem]
    supported: Callable[[Options, Sizes], bool]


def _linears(options: Options) -> Iterator[Sizes]:
    for layer in options.layers():
        yield {"N": layer.n, "K": layer.k}


def _linear(options: Options, sizes: Sizes, *, rank: int = 0) -> Problem:
    m, n, k = (sizes[name] for name in "MNK")
    _, weight = nf4_weight(options, n, k)
    leaves = {"dx": options.randn(m, k, grad=True)}
    if rank:
        leaves |= {"dA": options.randn(rank, k, grad=True), "dB": options.randn(n, rank, grad=True)}
    op = "lora_linear" if rank else "linear_4bit"
    return lambda namespace, x, *rest: getattr(namespace, op)(x, weight, *rest), leaves, options.randn(m, n)


def _fused_linear(options: Options, sizes: Sizes) -> bool:
    """On a CPU the kernels say themselves what they support."""
    if options.device.type != "cpu":
        return options.dtype != torch.float32
    name, functions = _LINEAR["cpu"]
    weight = pk.Weight4bit.quantize(torch.zeros(sizes["N"], sizes["K"]))
    return all(getattr(importlib.import_module(name), f)(sizes["M"], options.dtype, weight) for f in functions)


def _heads(options: Options) -> Iterator[Sizes]:
    yield {"B": 1, "H": 2, "D": 32, "P": 8} if options.quick else {"B": 1, "H": 4, "D": 128, "P": 32}


def _prefix(options: Options, sizes: Sizes) -> Problem:
    b, h, d, p = (sizes[name] for name in "BHDP")
    tensors, dy = prompt_attention.inputs(options, b, h, h, sizes["L"], d, p)
    leaves = {f"d{name}": t for name, t in zip(prompt_attention.NAMES[:5], tensors, strict=False)}
    return lambda namespace, *tensors: namespace.prefix_attention(*tensors, is_causal=True), leaves, dy


FUSED, DECODE = "fused", "decode + GEMM"
_LINEAR = {
    "cpu": ("peft_kernels.ops.linear_4bit.native_calls", ("fused_forward", "fused_backward")),
    "gpu": ("peft_kernels.ops.linear_4bit.triton_kernels", ("fused",)),
}
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), (1, 64)
_KEYS = (64, 256, 512, 1024, 2048, 4096), (32, 64)
_ATTENTION = {"cpu": ("peft_kernels.ops.prefix_attention.native_calls", ("own_keys",))}
OPS = {
    "linear_4bit": Choice((FUSED, DECODE), _LINEAR, "M", _ROWS, _linears, _linear, _fused_linear),
    "lora_linear": Choice((FUSED, DECODE), _LINEAR, "M", _ROWS, _linears, partial(_linear, rank=RANK), _fused_linear),
    "prefix_attention": Choice(
        ("our kernel", "torch's attention"),
        _ATTENTION,
        "L",
        _KEYS,
        _heads,
        _prefix,
        lambda options, sizes: True,
    ),
}


@contextlib.contextmanager
def forced(choice: Choice, way: str, device: torch.device) -> Iterator[None]:
    """Every call inside goes that way, on the backend whose functions decide."""
    name, functions = choice.decides[kind(device)]
    module = importlib.import_module(name)
    before = {function: getattr(module, function) for function in functions}
    try:
        for function in functions:
            setattr(module, function, lambda *arguments: way == choice.ways[0])
        with pk.use_backend(BACKENDS[kind(device)]):
            yield
    finally:
        for function, original in before.items():
            setattr(module, function, original)


def kind(device: torch.device) -> str:
    """Of a device: "cpu" or "gpu"."""
    return "cpu" if device.type == "cpu" else "gpu"


def why_not(op: str, device: torch.device) -> str | None:
    """Why there is nothing to tune for the operation on this device."""
    kinds = OPS[op].decides
    if kind(device) not in kinds:
        return f"{op} chooses by size on {', '.join(kinds)} only"
    return native.why_not() if kind(device) == "cpu" else None


def work(choice: Choice, options: Options, sizes: Sizes) -> Work:
    """Forward and backward at these sizes, each way."""
    torch.manual_seed(0)
    call, leaves, dy = choice.problem(options, sizes)

    def training(namespace: Any, leaves: dict[str, torch.Tensor], dy: torch.Tensor, **more: Any) -> Training:
        return Training(lambda: call(namespace, *leaves.values()), leaves, dy, **more)

    def truth() -> dict[str, torch.Tensor]:
        doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        return training(pk.reference, doubles, dy.double())()

    made = checked(truth, lambda: training(pk.reference, leaves, dy)())
    for way in choice.ways:
        absent = None if way == choice.ways[1] or choice.supported(options, sizes) else "no kernel"
        around = partial(forced, choice, way, options.device)
        made.add(way, "ours", partial(training, pk.functional, leaves, dy, around=around), absent)
    return made


def cases(op: str, options: Options) -> Iterator[Case]:
    """One case for each value of the size, and each of the others."""
    choice = OPS[op]
    for others in choice.others(options):
        for value in choice.values[options.quick]:
            sizes = {choice.size: value} | others
            yield Case(f"{label(others)}, {choice.size}={value}", op, sizes, partial(work, choice, options, sizes))


def label(sizes: Sizes) -> str:
    """Of a weight "NxK"; else each size by its name."""
    return f"{sizes['N']}x{sizes['K']}" if "N" in sizes else " ".join(f"{name}={size}" for name, size in sizes.items())


def times(record: dict[str, Any], phase: str) -> dict[str, float]:
    """Way -> p50 of a pass, of the ways that passed their check."""
    return {row["contender"]: row["phases"][phase]["p50"] for row in record["rows"] if phase in row.get("phases", {})}


def named_rows(op: str, records: list[dict[str, Any]]) -> Iterator[str]:
    """What the dispatcher's table should hold: for each pass the largest size up to which our kernel wins."""
    (ours, other), size = OPS[op].ways, OPS[op].size
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        others = {name: value for name, value in record["shape"].items() if name != size}
        groups.setdefault(label(others), []).append(record)
    for name, group in groups.items():
        for phase in PHASES:
            won: list[tuple[int, float]] = []
            for record in group:
                found = times(record, phase)
                if len(found) < 2 or found[ours] > found[other]:
                    break
                won.append((record["shape"][size], found[other] / found[ours]))
            gains = ", ".join(f"{gain:.2f} x at {size}={value}" for value, gain in won)
            most = won[-1][0] if won else 0
            yield f'"{phase} {name}": {most},  # {gains or f"{other} is faster, or alone, from the first on"}'
