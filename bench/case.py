"""What a case is made of: options, goals, contenders, and the check of the result that precedes every timing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_kernels.testing import assert_within_budget

from .shapes import Layer, layers
from .timing import CPU

Result = dict[str, torch.Tensor]
Call = Callable[[], Any]

OURS, FUNCTIONAL = "ours", "ours, functional"
# A peer must compute the same function: its root-mean-square error, relative to the result, is at most this, or where
# eager torch in the same dtype errs more than half of it (a layer norm's gradient in bfloat16), twice eager's.
PEER_TOLERANCE = 0.02
QUICK_ROWS = 16


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Options:
    """What the command line chose. A case file reads its sizes from here and makes its tensors with `randn`."""

    shapes: tuple[str, ...] = ()  # names of `shapes.SETS`; empty: the group's default
    quick: bool = False  # a small shape: does it work, not how fast
    device: torch.device = CPU
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True  # with the peers under torch.compile, which take long to compile

    def why_not_compiled(self) -> str | None:
        """Why the peers under torch.compile are left out, or None."""
        return None if self.compiled and not self.quick else "left out of this run: it takes long to compile"

    def layers(self) -> list[Layer]:
        """The linear layers to measure: by default those which the goals of this device are set on."""
        default = "quick" if self.quick else "square-4096" if self.device.type == "cpu" else "llama-3.1-8b"
        return list(layers(self.shapes or (default,)))

    def rows(self, cpu: tuple[int, ...], gpu: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of tokens to measure; one of them when quick."""
        rows = cpu if self.device.type == "cpu" else gpu
        return (min(rows, key=lambda m: abs(m - QUICK_ROWS)),) if self.quick else rows

    def judged(self, layer: Layer) -> bool:
        """Whether the CPU goals are set on this layer."""
        return layer.set == "square-4096" and self.device.type == "cpu" and not self.quick

    def randn(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> torch.Tensor:
        """A normal tensor on the device, in the dtype."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Goal:
    """A bar on `over` / `under`, a ratio of times or of another measure."""

    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None
    measure: str = "time"  # or "peak memory"


@dataclass(frozen=True)
class Case:
    """One row of a benchmark; nothing is allocated before build().

    flops and nbytes are the operations that it must do and the fewest bytes that it must move: they give its floor.
    """

    name: str
    op: str
    shape: dict[str, Any]
    work: Callable[[], Work]
    goals: tuple[Goal, ...] = ()
    flops: float = 0
    nbytes: float = 0

    def build(self, wanted: Callable[[str], bool] = lambda name: True) -> Work:
        """The work with its contenders made ready; peers that are not wanted are left out."""
        work = self.work()
        work.make(wanted)
        return work


@dataclass(frozen=True)
class Training:
    """A forward pass and its backward, measured together and apart.

    forward() gives y; `leaves` names each gradient and the leaf it belongs to, {"dx": x}; upstream is dY. around():
    a context that each pass is made in.
    """

    forward: Callable[[], torch.Tensor]
    leaves: dict[str, torch.Tensor]
    upstream: torch.Tensor
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def __call__(self) -> Result:
        y = self._output()
        return {"y": y.detach(), **self._gradients(y, retain_graph=False)}

    def phases(self) -> dict[str, list[Call]]:
        """The two halves; the backward one runs over one retained graph, which it makes when first called."""
        y = functools.cache(self._output)
        return {"forward": [self._output], "backward": [lambda: self._gradients(y(), retain_graph=True)]}

    def _output(self) -> torch.Tensor:
        with self.around():
            return self.forward()

    def _gradients(self, y: torch.Tensor, retain_graph: bool) -> Result:
        leaves = list(self.leaves.values())
        with self.around():
            gradients = torch.autograd.grad(y, leaves, self.upstream, retain_graph=retain_graph)
        return dict(zip(self.leaves, gradients, strict=True))


def without_grad(function: Callable[..., torch.Tensor], *args: Any) -> Call:
    """The call that gives y = function(*args), without a graph."""

    @torch.no_grad()
    def call() -> Result:
        return {"y": function(*args)}

    return call


@dataclass
class Contender:
    """A way to do the work. calls: one, or the same on several copies of the weight; kind: "ours", "peer", "floor"."""

    calls: list[Call]
    kind: str
    phases: dict[str, list[Call]] = field(default_factory=dict)


@dataclass
class Work:
    """A case made ready: who competes, who is absent and why, and the check that precedes every timing.

    check(name) makes the contender's call and raises AssertionError if the result is wrong. memory(name) is the peak
    in bytes where the case measures it in its own way.
    """

    check: Callable[[str], None]
    contenders: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory: Callable[[str], int | None] | None = None
    _makers: dict[str, tuple[str, Callable[[], list[Call] | Training], str | None]] = field(default_factory=dict)

    def add(self, name: str, kind: str, make: Callable[[], list[Call] | Training], why_not: str | None = None) -> None:
        """Enter a contender, or the reason for its absence; make() gives its calls, or a Training."""
        self._makers[name] = (kind, make, why_not)

    def make(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make the entered contenders ready; a peer is left out when it is not wanted."""
        for name, (kind, make, why_not) in self._makers.items():
            if kind == "peer" and not wanted(name):
                continue
            if why_not is None:
                try:
                    made = make()
                    calls, phases = ([made], made.phases()) if isinstance(made, Training) else (made, {})
                    self.contenders[name] = Contender(calls, kind, phases)
                    continue
                except Exception as error:  # one contender that cannot be built must not hide the others
                    why_not = f"{type(error).__name__}: {error}"
            self.absent[name] = why_not


def checked(reference: Callable[[], Result], eager: Callable[[], Result]) -> Work:
    """A Work whose check holds ours to the 2x rule on every tensor of the result, and a peer to PEER_TOLERANCE."""
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
                error, usual = (_relative_error(value[key], truth) for value in (actual, eager()))
                assert error <= max(PEER_TOLERANCE, 2 * usual), f"{key}: relative error {error:.3g}"

    work = Work(check)
    return work


def _relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the truth."""
    return ((actual.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()
