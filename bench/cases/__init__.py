"""The benchmark cases: one file for each family of operations, and the table of them.

A case file holds `cases(options) -> Iterator[Case]` with a one-line docstring, the goals of its cases, and a function
for each kind of work. It needs three things:

1. A `Case(name, op, shape, work, goals)` for each size; `options` gives the layers, the numbers of rows, the device and
   the dtype. Nothing is allocated before `work()` is called, so that listing the cases costs nothing.
2. The work: `checked(reference, eager)` makes a `Work` from the float64 truth and the same-dtype eager result (both
   dicts of tensors); then `work.add(name, kind, make, why_not)` for each contender. `kind` is "ours", "peer" or
   "floor"; `make()` returns a `Training` (forward and backward, measured together and apart) or a list of calls (one,
   or the same on several copies of the weight so that none is cached), each returning a dict with the reference's
   keys.
3. A line in GROUPS. The tests run every quick case; results are written to `<group>.json`.

A peer is a thin file in `bench/peers/` with NAME, why_not() and the functions that build its layers; it imports the
peer's package inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..case import Case, Options
from . import (
    bottleneck_adapter,
    codec,
    linear_4bit,
    lora_linear,
    prompt_attention,
    prompt_methods,
    scaled_linear,
    smollm2,
)

GROUPS: dict[str, Callable[[Options], Iterator[Case]]] = {
    "lora_linear": lora_linear.cases,
    "linear_4bit": linear_4bit.cases,
    "scaled_linear": scaled_linear.cases,
    "bottleneck_adapter": bottleneck_adapter.cases,
    "codec": codec.cases,
    "prompt_attention": prompt_attention.cases,
    "prompt_methods": prompt_methods.cases,
    "smollm2_step": smollm2.cases,
}
