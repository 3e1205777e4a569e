"""The demo's tables, plot and HTML page."""

from __future__ import annotations

import base64
import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.shapes import RANK

TEMPLATE = Path(__file__).with_name("demo_report.html.j2")
COLORS = {"plain": "#8a8f98", "kernels": "#1f6feb"}
LIBRARIES = ("torch", "peft", "bitsandbytes", "transformers", "triton")

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Check:
    """One condition of success: a measured value and its bound."""

    name: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """False for NaN, too."""
        return self.value <= self.bound

    def line(self) -> str:
        """For the terminal."""
        mark = "[green]ok  [/green]" if self.holds else "[red]FAIL[/red]"
        return f"{mark} {self.name}: {self.value:.3g} (bound {self.bound:.3g})"


def loss_rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Per checkpoint: held-out loss of each run, and the difference."""
    plain, kernels = results["plain"]["held_out"], results["kernels"]["held_out"]
    return [
        (f"held-out loss, step {step}", f"{a:.4f}", f"{kernels[step]:.4f}", f"{kernels[step] - a:+.4f}")
        for step, a in plain.items()
    ]


def summary_rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Step time, memory and generation speed of each run, and the ratio in favour of the kernels."""
    a, b = results["plain"], results["kernels"]
    return [
        (
            "training step, median",
            f"{a['step_seconds']:.3f} s",
            f"{b['step_seconds']:.3f} s",
            ratio(a, b, "step_seconds"),
        ),
        ("peak memory, training", gib(a), gib(b), ratio(a, b, "peak_bytes")),
        (
            "generation",
            f"{a['tokens_per_second']:.1f} tokens/s",
            f"{b['tokens_per_second']:.1f} tokens/s",
            ratio(b, a, "tokens_per_second"),
        ),
    ]


def gib(result: dict[str, Any]) -> str:
    """Peak memory in words."""
    return f"{result['peak_bytes'] / 2**30:.2f} GiB" if result["peak_bytes"] else "not measured"


def ratio(above: dict[str, Any], below: dict[str, Any], key: str) -> str:
    """above / below, as 1.23x."""
    return f"{above[key] / below[key]:.2f}x" if above[key] and below[key] else ""


def table(title: str, rows: list[Row], runs: dict[str, str]) -> Table:
    """A table for the terminal."""
    out = Table(title=title, title_justify="left")
    for heading in ("", *runs.values(), "difference" if title == "Loss" else "gain"):
        out.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        out.add_row(*row)
    return out


def write_png(path: Path, results: dict[str, dict[str, Any]], runs: dict[str, str]) -> None:
    """Loss curves on the left, the time of every step on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, times) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for task, name in runs.items():
        result, color = results[task], COLORS[task]
        steps = range(1, len(result["losses"]) + 1)
        wide = {"plain": 4.0, "kernels": 1.5}[task]  # the lines coincide: the first shows behind the second
        losses.plot(steps, result["losses"], color=color, linewidth=wide, label=f"{name}, training")
        at = [int(step) for step in result["held_out"]]
        marker = {"plain": "s", "kernels": "o"}[task]
        size = {"plain": 9, "kernels": 5}[task]
        values = list(result["held_out"].values())
        losses.plot(
            at, values, marker, color=color, markersize=size, markeredgecolor="white", label=f"{name}, held out"
        )
        times.plot(steps, result["seconds"], ".", color=color, alpha=0.6)
        median = result["step_seconds"]
        times.axhline(median, color=color, linewidth=1.5, label=f"{name}, median {median:.2f} s")
    losses.set(title="Loss", xlabel="step", ylabel="cross-entropy per token")
    times.set(title="Time of a training step", xlabel="step", ylabel="seconds", ylim=(0, None))
    for axes in (losses, times):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e8eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> str:
    """Where it ran, with versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"


def write_html(
    path: Path,
    png: Path,
    results: dict[str, dict[str, Any]],
    runs: dict[str, str],
    checks: list[Check],
    settings: Any,
    seconds: float,
) -> None:
    """One self-contained page."""
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    page = template.render(
        image=base64.b64encode(png.read_bytes()).decode(),
        results=results,
        runs=runs,
        checks=checks,
        settings=settings,
        seconds=seconds,
        losses=loss_rows(results),
        summary=summary_rows(results),
        machine=machine(),
        rank=RANK,
    )
    path.write_text(page, encoding="utf-8")
