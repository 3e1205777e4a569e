"""Predicted times of the 4-bit kernels on GPUs: bytes, tensor-core work and instructions at published rates.

A prediction chooses tiles and cross-overs where no GPU is at hand; a measurement overrules it. `python -m bench model`
prints both. Instructions per weight come from the ahead-of-time table, bench/results/aot.json. Training layers are
predicted in `model_training`, the goals on GPUs in `model_bars`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .environment import RESULTS
from .shapes import SETS


@dataclass(frozen=True)
class Device:
    """A GPU at its published rates: bytes/s, dense bf16 FLOP/s, bytes of L2, and what a multiprocessor issues.

    card: how the driver names it, in part. lanes: threads that a multiprocessor can issue an instruction for in each
    clock.
    """

    name: str
    card: str
    target: str
    multiprocessors: int
    hertz: float
    bandwidth: float
    flops: float
    l2: float
    lanes: int = 128

    @property
    def clocks(self) -> float:
        """Multiprocessor-clocks a second."""
        return self.multiprocessors * self.hertz

    @property
    def issue(self) -> float:
        """Thread-instructions a second."""
        return self.clocks * self.lanes


# Vendors' data sheets. The clock is the one at which the sheet's tensor rate holds.
DEVICES = (
    Device("H100 SXM", "H100 80GB HBM3", "sm_90", 132, 1.83e9, 3.35e12, 989.4e12, 50e6),
    Device("H100 PCIe", "H100 PCIe", "sm_90", 114, 1.62e9, 2.04e12, 756e12, 50e6),
    Device("A100 SXM", "A100-SXM", "sm_80", 108, 1.41e9, 2.04e12, 312e12, 40e6),
    Device("B200", "B200", "sm_100", 148, 1.85e9, 8.0e12, 2250e12, 126e6),
    Device("MI300X", "MI300X", "gfx942", 304, 2.1e9, 5.3e12, 1307e12, 256e6),
)

# What real kernels reach of the published rates. The first two reproduce what is known of decode + cuBLAS on H100
# (the decode costs 14 % of the GEMM at M = 2048); the third is a guess that the first visit has to correct.
COPY, GEMM, ISSUE = 0.9, 0.7, 0.7
LAUNCH = 2e-6  # seconds that each further kernel of a call adds on the device
NESTED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a 4-bit weight with double quantization
HALF = 2  # bytes of a bf16 value


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they are made of."""

    memory: float
    tensor: float
    issue: float
    launches: int

    @property
    def seconds(self) -> float:
        """A warp that decodes does not feed the tensor cores, so those two add up; memory runs beside them."""
        return max(self.memory, self.tensor + self.issue) + self.launches * LAUNCH


def fused(
    device: Device, m: int, n: int, k: int, sass_per_weight: float, *, block_m: int, splits: int = 1, rank: int = 0
) -> Prediction:
    """The kernel that decodes W (N, K) in registers, for m rows in tiles of block_m.

    With LoRA, up to 16 rows its shrink runs beside the weight's programs and its expand comes with the planes' sum; for
    more rows the shrink is two launches before.
    """
    tiles = math.ceil(m / block_m)
    nbytes = NESTED_BYTES * n * k + HALF * m * (k + n) + (rank > 0) * HALF * (rank * (k + n) + m * k)
    nbytes += (splits > 1) * 8 * splits * m * n  # float32 planes, written and read
    return Prediction(
        nbytes / (device.bandwidth * COPY),
        2 * tiles * block_m * n * k / (device.flops * GEMM),
        tiles * n * k * sass_per_weight / (device.issue * ISSUE),
        (splits > 1 or (rank > 0 and m <= 16)) + 2 * (rank > 0 and m > 16),
    )


# What a multiprocessor of NVIDIA's does in a clock besides issuing: lanes of integer instructions, which byte permutes
# are, and words from shared memory without bank conflicts.
INTEGER_LANES, SHARED_WORDS = 64, 32
CUDA_TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}


def few_rows(device: Device, m: int, n: int, k: int, row: dict[str, Any]) -> Prediction:
    """csrc/cuda/linear_4bit.cu, by its row of the ahead-of-time table. Its tensor cores take x in tiles of 8 rows."""
    clocks = max(
        row["sass_per_weight"] / device.lanes,
        row["integer_per_weight"] / INTEGER_LANES,
        row["shared_per_weight"] / SHARED_WORDS,
    )
    nbytes = NESTED_BYTES * n * k + HALF * m * (k + n)
    return Prediction(
        nbytes / (device.bandwidth * COPY),
        2 * 8 * math.ceil(m / 8) * n * k / (device.flops * GEMM),
        n * k * clocks / (device.clocks * ISSUE),
        0,
    )


def cuda_row(device: Device, m: int, path: Path = RESULTS / "aot.json") -> dict[str, Any] | None:
    """The ahead-of-time row of the kernel that serves m rows of bfloat16 over a nested weight, or None."""
    target = CUDA_TARGETS.get(device.target)
    if m > 16 or target is None or not path.exists():
        return None
    launch = f"linear_4bit.cu linear_4bit_kernel<__nv_bfloat16, {1 if m <= 8 else 2}, true>"
    table = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return next((row for row in table if (row["target"], row["launch"]) == (target, launch)), None)


def decode(device: Device, n: int, k: int, in_cache: bool = False) -> Prediction:
    """One decode of W into a scratch, or into the L2 cache."""
    nbytes = (NESTED_BYTES + (0 if in_cache else HALF)) * n * k
    issue = n * k * decode_sass(device.target) / (device.issue * ISSUE)
    return Prediction(nbytes / (device.bandwidth * COPY), 0, issue, 1)


def gemm(device: Device, m: int, n: int, k: int) -> Prediction:
    """The vendor's dense GEMM."""
    nbytes = HALF * (n * k + m * (n + k))
    return Prediction(nbytes / (device.bandwidth * COPY), 2 * m * n * k / (device.flops * GEMM), 0, 1)


def decode_and_gemm(device: Device, m: int, n: int, k: int) -> float:
    """Seconds of decode to scratch, then the vendor's GEMM."""
    return decode(device, n, k).seconds + gemm(device, m, n, k).seconds


@functools.cache
def decode_sass(target: str) -> float:
    """Instructions per weight of the decode to scratch; 0 where the table has none: then its traffic is taken."""
    return sass_table().get((target, "nf4 dequantize bf16 nested _nf4_dequantize_kernel"), 0.0)


def sass_table(path: Path = RESULTS / "aot.json") -> dict[tuple[str, str], float]:
    """(target, launch) -> instructions per weight, from the ahead-of-time table; empty where there is none."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["target"], row["launch"]): row["sass_per_weight"] for row in rows if row["sass_per_weight"]}


def records(device: Device, group: str, results: Path) -> Iterator[dict]:
    """The cases of a group that were measured on this device, from the committed results."""
    for path in results.glob(f"*/{group}.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if device.card in record["device"].get("gpu", ""):
            yield from record["cases"]


def measured(device: Device, m: int, n: int, k: int, results: Path = RESULTS) -> float | None:
    """The median of our forward at this shape, or None."""
    for case in records(device, "linear_4bit", results):
        if [case["shape"].get(name) for name in "MNK"] == [m, n, k]:
            return next((r["seconds"]["p50"] for r in case["rows"] if r["contender"] == "ours"), None)
    return None


# Rows of x, and the launch of the ahead-of-time table whose tile serves them.
_LAUNCH_ROWS = {1: 1, 4: 1, 16: 16, 32: 32, 64: 64, 128: 256, 256: 256, 512: 256, 2048: None, 8192: None}


def triton(device: Device, m: int, n: int, k: int, sass: dict[tuple[str, str], float], *, rank: int = 0) -> Prediction:
    """The fused forward kernel as it is compiled for m rows, in the better of the two layouts; nan without a figure."""
    kinds = ("nested", "nested tiled")
    launches = (f"linear_4bit forward M={_LAUNCH_ROWS[m]} bf16 {kind} _linear_4bit_fwd_kernel" for kind in kinds)
    figures = [sass[device.target, launch] for launch in launches if (device.target, launch) in sass]
    if not figures:
        return Prediction(math.nan, 0, 0, 0)
    most = 128 if device.target == "sm_90" else 64
    block_m = next(size for size in (8, 16, 32, 64, 128) if size >= min(m, most))
    splits = 4 if m <= 32 else 2 if m <= 64 else 1  # the sum of the planes included
    return fused(device, m, n, k, min(figures), block_m=block_m, splits=splits, rank=rank)


def rows(device: Device, n: int, k: int, sass: dict[tuple[str, str], float]) -> Iterator[tuple[int, float, float]]:
    """(m, seconds fused or nan where there is no figure, seconds of decode + GEMM) for each number of rows."""
    for m in _LAUNCH_ROWS:
        yield m, triton(device, m, n, k, sass).seconds, decode_and_gemm(device, m, n, k)


# Instructions per weight of what bitsandbytes 0.50.2 runs for up to so many rows of bfloat16 on sm_90: the loops of
# gemm_4bit_sm80_m16n8k16 with tiles 32x64x128 and 64x64x64, counted in its wheel (a test counts them again).
BNB_SASS = {32: 8.125, 64: 11.0}


def bitsandbytes(device: Device, m: int, n: int, k: int) -> float:
    """Seconds of bitsandbytes' fused kernel for at most 64 rows, and of decode + GEMM for more."""
    block_m = next((rows for rows in BNB_SASS if m <= rows), None)
    if block_m is None:
        return decode_and_gemm(device, m, n, k)
    return fused(device, m, n, k, BNB_SASS[block_m], block_m=block_m).seconds


def _cuda_cells(device: Device, m: int, n: int, k: int, floor: float) -> Iterator[str]:
    row = cuda_row(device, m)
    seconds = few_rows(device, m, n, k, row).seconds if row else math.nan
    yield f"{seconds * 1e6:.1f}" if row else "-"
    yield f"{floor / seconds:.0%}" if row else ""


def main() -> None:
    """Print the predictions, and the measurements where there are any."""
    sass, (n, k) = sass_table(), SETS["llama-3.1-8b"]["gate, up"]
    table = Table(title=f"predicted microseconds, NF4 {n}x{k}, bf16; measured where a visit left results")
    cuda = ("CUDA C++", "of copy bandwidth")
    for column in ("device", "M", "Triton", "of copy bandwidth", *cuda, "decode + GEMM", "measured"):
        table.add_column(column, justify="right")
    for device in DEVICES:
        floor = NESTED_BYTES * n * k / (device.bandwidth * COPY)
        for m, seconds, vendor in rows(device, n, k, sass):
            real = measured(device, m, n, k)
            share = f"{floor / seconds:.0%}" if m <= 16 and not math.isnan(seconds) else ""
            shown = "-" if math.isnan(seconds) else f"{seconds * 1e6:.1f}"
            cells = (
                shown,
                share,
                *_cuda_cells(device, m, n, k, floor),
                f"{vendor * 1e6:.1f}",
                "-" if real is None else f"{real * 1e6:.1f}",
            )
            table.add_row(device.name, str(m), *cells)
    console = Console()
    console.print(table)
    if not sass:
        print("No ahead-of-time table: `python -m bench aot` makes it, and the fused kernels' column with it.")
    from . import model_bars  # it needs this module

    console.print(model_bars.ways_table())
    console.print(model_bars.bars_table(DEVICES[0], sass))
