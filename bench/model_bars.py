"""The goals on GPUs (H100, bf16, Llama-3.1-8B shapes): what the model predicts for each, beside a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from . import model_training as training
from . import tables
from .environment import RESULTS
from .model import (
    COPY,
    DEVICES,
    GEMM,
    HALF,
    LAUNCH,
    NESTED_BYTES,
    Device,
    bitsandbytes,
    cuda_row,
    decode_and_gemm,
    few_rows,
    gemm,
    records,
    sass_table,
    triton,
)
from .shapes import RANK, SETS

LARGE = SETS["llama-3.1-8b"]["gate, up"]
ROWS = (2048, 8192, 16384)
ATTENTION = 0.5  # of the tensor rate that library attention reaches: a guess


class Bar(NamedTuple):
    """A goal. measured: the group of cases, the start of the goal's text in its results, and their M."""

    work: str
    goal: str
    bound: float
    at_least: bool
    predicted: float
    measured: tuple[str, str, int] | None = None

    @property
    def met(self) -> bool:
        """Whether the prediction meets it."""
        return self.predicted >= self.bound if self.at_least else self.predicted <= self.bound


def bars(device: Device, sass: dict[tuple[str, str], float]) -> Iterator[Bar]:
    """Every goal whose code is there."""
    yield from _training_bars(device)
    yield from _small_bars(device, sass)
    yield from _other_bars(device)


def _training_bars(device: Device) -> Iterator[Bar]:
    (n, k), m = LARGE, 8192
    ours, where = training.step(device, m, n, k, RANK), ("lora_linear", m)
    work = f"QLoRA forward + backward, {n}x{k}, M={m}, r={RANK}"
    dense, unsloth = training.dense_step(device, m, n, k), training.unsloth_order(device, m, n, k)

    def bar(goal: str, bound: float, at_least: bool, predicted: float) -> Bar:
        return Bar(work, goal, bound, at_least, predicted, (where[0], goal, where[1]))

    yield bar("time of ours / dense", 1.15, False, ours / dense)
    yield bar("time of unsloth's order / ours", 1.2, True, unsloth / ours)
    yield bar("time of peft + bitsandbytes / ours", 1.6, True, training.peft_bnb(device, m, n, k) / ours)
    mine, theirs = training.peak_bytes(m, n, k, RANK)
    yield bar("peak memory of ours / peft + bitsandbytes", 0.6, False, mine / theirs)


def _small_bars(device: Device, sass: dict[tuple[str, str], float]) -> Iterator[Bar]:
    n, k = LARGE
    floor, share = NESTED_BYTES * n * k / (device.bandwidth * COPY), "share of copy bandwidth"
    for m in (1, 16):
        where = ("linear_4bit", "time of streaming", m)
        seconds = triton(device, m, n, k, sass).seconds
        yield Bar(f"decode, {n}x{k}, M={m}", share, 0.7, True, floor / seconds, where)
        if row := cuda_row(device, m):
            seconds = few_rows(device, m, n, k, row).seconds
            yield Bar(f"the same in CUDA C++, M={m}", share, 0.7, True, floor / seconds)
    lora = triton(device, 16, n, k, sass, rank=RANK).seconds / triton(device, 16, n, k, sass).seconds
    yield Bar(f"decode, {n}x{k}, M=16, r={RANK}", "time with LoRA / without", 1.08, False, lora)
    for m, bound in ((16, 1.5), (32, 1.0), (64, 1.0), (128, 1.0), (256, 1.0)):
        ours = triton(device, m, n, k, sass).seconds
        theirs, goal = bitsandbytes(device, m, n, k) / ours, "time of bitsandbytes / ours"
        yield Bar(f"NF4, {n}x{k}, M={m}", goal, bound, True, theirs, ("linear_4bit", goal, m))
        vendor = decode_and_gemm(device, m, n, k) / ours
        yield Bar(f"NF4, {n}x{k}, M={m}", "time of decode + GEMM / ours", 1.0, True, vendor)


def _other_bars(device: Device) -> Iterator[Bar]:
    (n, k), m = LARGE, 8192
    copy = training.copy_seconds
    # x is read for the product and, from its end, as the residual: what half of the L2 cache holds of the rows in work
    # comes from there (y is stored to be evicted first)
    width, r = 4096, 64
    tensor = 4 * m * width * r / (device.flops * GEMM)
    rows = min(m, 64 * device.multiprocessors)
    again = 1 - min(1.0, device.l2 / 2 / (HALF * rows * width))
    ours = max(copy(device, (2 + again) * HALF * m * width), tensor) + LAUNCH
    yield Bar("bottleneck 4096 r=64 forward, M=8192", "share of copy bandwidth", 0.75, True,
              copy(device, 2 * HALF * m * width) / ours)  # fmt: skip
    eager = copy(device, 7 * HALF * m * width) + 6 * LAUNCH  # two products, scaling, sum
    yield Bar("bottleneck 4096 r=64 forward, M=8192", "time of eager / ours", 3.0, True, eager / ours)
    base = training.dense_step(device, m, n, k)
    # y is read and written once more; dY and y are read and dY written
    yield Bar(f"IA3 forward + backward, {n}x{k}, M={m}", "time / frozen layer", 1.03, False,
              1 + copy(device, 5 * HALF * m * n) / base)  # fmt: skip
    yield Bar(f"BitFit forward + backward, {n}x{k}, M={m}", "time / frozen layer", 1.03, False,
              1 + copy(device, HALF * m * n) / base)  # fmt: skip
    for length in (2048, 8192):
        q, causal = 4 * 32 * length * 128, 0.5
        plain = 3.5 * 4 * q * length * causal / (device.flops * ATTENTION)  # backward: two and a half times forward
        # q and the result of the keys in, the merged one out; backward q, dY, result in, dQ in and out
        prompt = copy(device, 8 * HALF * q) + 3.5 * 4 * q * 32 / (device.flops * ATTENTION) + 3 * LAUNCH
        yield Bar(f"prefix attention P=32, B=4 H=32 L={length} D=128", "time / plain attention", 1.1, False,
                  1 + prompt / plain)  # fmt: skip


def measured(device: Device, bar: Bar, results: Path = RESULTS) -> float | None:
    """The median that a visit left for this goal on the large layer, or None."""
    if bar.measured is None:
        return None
    group, goal, m = bar.measured
    for case in records(device, group, results):
        if [case["shape"].get(name) for name in "MNK"] == [m, *LARGE]:
            for found in case["goals"]:
                if found["goal"].startswith(goal):
                    return found["measured"]["p50"]
    return None


HEADER = ["work", "figure", "goal", "predicted", "met", "measured"]


def bar_cells(device: Device, sass: dict[tuple[str, str], float]) -> list[list[str]]:
    """Goal, prediction, measurement: the cells of every row."""
    rows = []
    for bar in bars(device, sass):
        real = measured(device, bar)
        bound = f"{'>=' if bar.at_least else '<='} {bar.bound:g}"
        shown = "-" if math.isnan(bar.predicted) else f"{bar.predicted:.2f}"
        met = "-" if math.isnan(bar.predicted) else "yes" if bar.met else "no"
        rows.append([bar.work, bar.goal, bound, shown, met, "-" if real is None else f"{real:.2f}"])
    return rows


def bars_table(device: Device, sass: dict[tuple[str, str], float]) -> Table:
    """For the terminal."""
    table = Table(*HEADER, title=f"goals on {device.name}: predicted, and measured where a visit left results")
    for row in bar_cells(device, sass):
        table.add_row(*row)
    return table


def markdown(path: Path) -> str:
    """For the README, from an ahead-of-time table."""
    return tables.markdown_table([HEADER, *bar_cells(DEVICES[0], sass_table(path))])


def ways_table() -> Table:
    """What each way to add LoRA to a dense GEMM costs, for the layers of a block, forward and backward."""
    names = list(training.lora_ways(DEVICES[0], 1, 1, 1, RANK))
    table = Table(title=f"predicted cost of adding r={RANK} to the vendor's GEMM, % of it")
    for column in ("device", "M", "result x depth", *names):
        table.add_column(column, justify="right")
    for device in (DEVICES[0], *DEVICES[2:]):
        for n, k in dict.fromkeys(SETS["llama-3.1-8b"].values()):
            for m in ROWS:
                dense = gemm(device, m, n, k).seconds
                shares = [f"{cost / dense:.1%}" for cost in training.lora_ways(device, m, n, k, RANK).values()]
                table.add_row(device.name, str(m), f"{n}x{k}", *shares)
    return table
