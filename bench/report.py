"""What a run leaves behind: a record of the machine, JSON, a table for the terminal, Markdown, a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import peft_kernels as pk
from peft_kernels import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "bitsandbytes", "peft", "transformers", "numpy")
FLAGS = ("avx2", "avx512f", "avx512bw", "avx512vbmi", "avx512_bf16", "avx512_vnni", "amx_bf16")
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def cpu() -> tuple[str, list[str]]:
    """(model name, the instruction-set flags that matter here)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"model name\s*:\s*(.+)", text)
    found = re.search(r"flags\s*:\s*(.+)", text)
    flags = found.group(1).split() if found else []
    return (model.group(1) if model else platform.machine()), [flag for flag in FLAGS if flag in flags]


def device() -> dict[str, Any]:
    """The machine."""
    model, flags = cpu()
    core = native.load()
    return {
        "cpu": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": core.isa() if core else native.why_not(),
        "platform": platform.platform(),
    }


def device_slug() -> str:
    """The machine as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu()[0]} {os.cpu_count()} cores".lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures; `load` is the machine's one-minute load before the run."""
    versions = {"peft_kernels": pk.__version__, "python": platform.python_version()}
    return {
        "device": device(),
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write(result: dict[str, Any], folder: Path) -> Path:
    """The JSON file of one group, and the plot beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['group']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(result, path.with_suffix(".png"))
    return path


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    scale, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def header() -> list[str]:
    return ["case", "contender", "check", "time (p20 - p80)", "best", "time / ours", "goals"]


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, for the terminal and for Markdown."""
    table = []
    for case in result["cases"]:
        name, goals = case["case"], [goal_text(goal) for goal in case["goals"]]
        for row in case["rows"]:
            time, times = row.get("seconds"), row.get("time_over_ours")
            spent = f"{duration(time['p50'])} ({duration(time['p20'])} - {duration(time['p80'])})" if time else "-"
            if memory := row.get("peak_memory_bytes"):
                spent += f", peak {memory / 2**20:.0f} MiB"
            check = row["check"] if row["check"] != "failed" else f"failed: {row['why']}"
            goal = goals.pop(0) if goals else ""
            best = duration(time["best"]) if time else ""
            table.append([name, row["contender"], check, spent, best, f"{times['p50']:.2f}" if times else "", goal])
            name = ""
        table += [["", contender, f"absent: {why}", "", "", "", ""] for contender, why in case["absent"].items()]
        table += [["", "", "", "", "", "", goal] for goal in goals]
    return table


def goal_text(goal: dict[str, Any]) -> str:
    """One goal in words: what, the bound, what was measured."""
    if goal["met"] is None:
        return f"{goal['goal']} {goal['bound']}: not measured"
    return f"{goal['goal']} {goal['bound']}: {goal['measured']['p50']:.2f}, {'met' if goal['met'] else 'NOT MET'}"


def markdown(result: dict[str, Any]) -> str:
    """The table for the README, with the machine and the commit."""
    machine, versions = result["device"], result["versions"]
    peers = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if versions.get(name))
    facts = f"{machine['cpu']}, {machine['threads']} threads, {machine['native']}; {peers}"
    rows = [header(), ["---"] * len(header()), *lines(result)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"{facts}; {result['date'][:10]}, commit {(result['commit'] or 'unknown')[:10]}.\n\n{table}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Times relative to ours, one bar each with its p20 - p80 range, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{case['case']}: {row['contender']}", row["kind"], row["time_over_ours"])
        for case in result["cases"]
        for row in case["rows"]
        if "time_over_ours" in row
    ]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.24 * len(bars)), layout="constrained")
    colours = {"peer": "tab:orange", "floor": "tab:grey", "ours": "tab:blue"}
    for y, (_, kind, r) in enumerate(bars):
        spread = [[r["p50"] - r["p20"]], [r["p80"] - r["p50"]]]
        axes.barh(y, r["p50"] - 1, left=1, color=colours[kind])
        axes.errorbar(r["p50"], y, xerr=spread, color="black", linewidth=0.8, capsize=2)
        end = (max(r["p80"], 1), y)
        axes.annotate(f"{r['p50']:.2f}", end, (4, 0), textcoords="offset points", va="center", size=7)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], size=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="tab:blue")
    axes.set_xlabel("time / our time: right of the line, we are faster")
    axes.set_title(f"{result['group']} on {result['device']['cpu']}, {result['device']['threads']} threads", size=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
