"""The plots of a group's record, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import environment

COLOURS = {"peer": "tab:orange", "floor": "tab:grey", "ours": "tab:blue"}


def ratios(result: dict[str, Any], path: Path) -> None:
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
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="tab:blue")
    axes.set_xlabel("time / our time: right of the line, we are faster")
    axes.set_title(f"{result['group']} on {environment.name(result['device'])}", size=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
