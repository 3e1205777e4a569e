"""Interleaved timing: the figure is a ratio of neighbours in time, so a busy machine disturbs both of its terms.

In each round every contender is sampled once, in an order drawn anew for each round: what the one before leaves in the
caches is nobody's lasting advantage. A sample repeats the call until it lasts long enough for the clock. Ratios are
taken within a round, and their median over the rounds is reported.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

CPU = torch.device("cpu")
Calls = Iterator[Callable[[], Any]]


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: about `seconds`, within the bounds on rounds; a sample lasts `sample` seconds."""

    seconds: float = 8.0
    sample: float = 2e-3
    min_rounds: int = 7
    max_rounds: int = 60

    def lasting(self, seconds: float) -> Effort:
        """The same, of another length."""
        return replace(self, seconds=seconds)


FULL = Effort()
QUICK = Effort(seconds=0.5, sample=5e-4, min_rounds=3, max_rounds=9)


def cache_bytes() -> int:
    """The size of the last-level cache; 32 MiB where the system does not tell."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def copies_beyond_cache(nbytes: int) -> int:
    """How many copies of a weight, used in turn, keep it out of the cache: as in a model, where a layer comes cold.

    At most 64: copies of small layers are as many as a model has, and may stay in the cache as they do there. A GPU's
    cache is flushed before each call instead.
    """
    return min(64, max(1, math.ceil(2 * cache_bytes() / nbytes)))


def _host_seconds(calls: Calls, repeat: int) -> float:
    """Seconds per call by the host's clock."""
    batch = list(itertools.islice(calls, repeat))
    start = time.perf_counter()
    for call in batch:
        call()
    return (time.perf_counter() - start) / repeat


class DeviceClock:
    """Seconds per call between two events around it, after the device's cache was flushed.

    The flushes are also the host's head start: as many as last half as long again as the call took to issue before, up
    to LEAD seconds, so that launches are not in its time: as in a model that keeps the device busy, where the host runs
    ahead.
    """

    LEAD = 5e-3

    def __init__(self, flush: torch.Tensor):
        self.module, self.flush = torch.get_device_module(flush.device), flush
        self.issuing: dict[int, float] = {}  # id of a call -> seconds, the last time
        self.flushing = self.LEAD
        for _ in range(2):  # the first loads the kernel
            self.flushing = self(itertools.repeat(flush.zero_), 4)

    def __call__(self, calls: Calls, repeat: int) -> float:
        pairs = []
        for call in itertools.islice(calls, repeat):
            start, end = self.module.Event(enable_timing=True), self.module.Event(enable_timing=True)
            for _ in range(1 + math.ceil(min(1.5 * self.issuing.get(id(call), 0.0), self.LEAD) / self.flushing)):
                self.flush.zero_()
            start.record()
            before = time.perf_counter()
            call()
            self.issuing[id(call)] = time.perf_counter() - before
            end.record()
            pairs.append((start, end))
        self.module.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / repeat


def clock(device: torch.device) -> Callable[[Calls, int], float]:
    """The function that takes seconds per call of `repeat` calls on this device."""
    if device.type == "cpu":
        return _host_seconds
    l2 = getattr(torch.get_device_module(device).get_device_properties(device), "L2_cache_size", 64 << 20)
    return DeviceClock(torch.empty(4 * l2, dtype=torch.uint8, device=device))


def measure(
    contenders: dict[str, Sequence[Callable[[], Any]]],
    effort: Effort = FULL,
    tick: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry for each round.

    Args:
        contenders: name -> the call, or the same call on several copies of the weight, used in turn.
        tick: called after each round with (rounds done, rounds in all).
    """
    if not contenders:
        return {}
    seconds = clock(device)
    calls = {name: itertools.cycle(copies) for name, copies in contenders.items()}
    for name, copies in contenders.items():  # warm-up: every copy has been touched
        seconds(calls[name], len(copies))
    sample = effort.sample if device.type == "cpu" else effort.sample / 10  # events time each call by itself
    repeat, per_round = {}, 0.0
    for name in contenders:
        start = time.perf_counter()
        repeat[name] = max(1, math.ceil(sample / seconds(calls[name], 2)))
        # what a call takes of this run: on a device its flushes too
        per_round += (time.perf_counter() - start) / 2 * repeat[name]
    rounds = min(effort.max_rounds, max(effort.min_rounds, int(effort.seconds / per_round)))

    order, times = random.Random(0), {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in order.sample(list(contenders), len(contenders)):
                times[name].append(seconds(calls[name], repeat[name]))
            tick(i + 1, rounds)
    finally:
        gc.enable()
    return times


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated."""
    ordered = sorted(values)

    def at(q: float) -> float:
        position = q * (len(ordered) - 1)
        low, high = math.floor(position), math.ceil(position)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Quantiles over the rounds of over[i] / under[i]; p50 is the figure."""
    return quantiles([a / b for a, b in zip(over, under, strict=True)])
