"""The plots of a group's record, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from . import environment

Target = Path | IO[bytes]
COLOURS = {"peer": "tab:orange", "floor": "tab:grey", "ours": "tab:blue"}


def ratios(result: dict[str, Any], target: Target) -> None:
    """Times relative to ours, one bar each with its p20 - p80 range, on a logarithmic axis."""
    bars = [
        (f"{case['case']}: {row['contender']}", row["kind"], row["time_over_ours"])
        for case in result["cases"]
        for row in case["rows"]
        if "time_over_ours" in row
    ]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.24 * len(bars)), layout="constrained")
    for y, (_, kind, r) in enumerate(bars):
        spread = [[r["p50"] - r["p20"]], [r["p80"] - r["p50"]]]
        axes.barh(y, r["p50"] - 1, left=1, color=COLOURS[kind])
        axes.errorbar(r["p50"], y, xerr=spread, color="black", linewidth=0.8, capsize=2)
        end = (max(r["p80"], 1), y)
        axes.annotate(f"{r['p50']:.2f}", end, (4, 0), textcoords="offset points", va="center", size=7)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], size=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="tab:blue")
    axes.set_xlabel("time / our time: right of the line, we are faster")
    axes.set_title(f"{result['group']} on {environment.name(result['device'])}", size=9)
    figure.savefig(target, dpi=150, format="png")
    plt.close(figure)


def has_roofline(result: dict[str, Any]) -> bool:
    """Whether some case states its operations and bytes."""
    return bool(result.get("ceilings")) and any(case.get("flops") and case.get("nbytes") for case in result["cases"])


def roofline(result: dict[str, Any], target: Target) -> None:
    """Rate reached by each contender against operations per byte, under the two measured ceilings."""
    ceilings = result["ceilings"]
    cases = [case for case in result["cases"] if case.get("flops") and case.get("nbytes")]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [case["flops"] / case["nbytes"] for case in cases]
    ridge = ceilings["flops_per_second"] / ceilings["bytes_per_second"]
    ends = sorted([min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2])
    roof = [min(ceilings["flops_per_second"], x * ceilings["bytes_per_second"]) / 1e9 for x in ends]
    axes.plot(ends, roof, color="black", linewidth=1, label="measured ceilings")
    for kind in ("peer", "ours"):  # a floor is another computation
        points = [
            (case["flops"] / case["nbytes"], case["flops"] / row["seconds"]["p50"] / 1e9)
            for case in cases
            for row in case["rows"]
            if row["kind"] == kind and "seconds" in row
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, color=COLOURS[kind], label=kind, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{result['group']} on {environment.name(result['device'])}", size=9)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=120, format="png")
    plt.close(figure)
