"""A group's record as a table: for the terminal, for Markdown, for the report."""

from __future__ import annotations

from typing import Any

from . import environment

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
HEADER = ["case", "contender", "check", "time (p20 - p80)", "forward", "backward", "peak", "time / ours", "goals"]


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    scale, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def size(nbytes: int | None) -> str:
    """In MiB; empty when unknown."""
    return "" if nbytes is None else f"{nbytes / 2**20:.3g} MiB" if nbytes < 1000 << 20 else f"{nbytes >> 20} MiB"


def row_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a contender, between its case and the goals."""
    time, times, phases = row.get("seconds"), row.get("time_over_ours"), row.get("phases", {})
    spent = f"{duration(time['p50'])} ({duration(time['p20'])} - {duration(time['p80'])})" if time else "-"
    apart = [duration(phases[name]["p50"]) if name in phases else "" for name in ("forward", "backward")]
    check = row["check"] if row["check"] != "failed" else f"failed: {row['why']}"
    peak = size(row.get("peak_memory_bytes"))
    return [row["contender"], check, spent, *apart, peak, f"{times['p50']:.2f}" if times else ""]


def goal_text(goal: dict[str, Any]) -> str:
    """One goal in words: what, the bound, what was measured."""
    if goal["met"] is None:
        return f"{goal['goal']} {goal['bound']}: not measured"
    return f"{goal['goal']} {goal['bound']}: {goal['measured']['p50']:.2f}, {'met' if goal['met'] else 'NOT MET'}"


def table(result: dict[str, Any]) -> list[list[str]]:
    """The header and the rows; a column without content is left out."""
    rows, blank = [], [""] * 6
    for case in result["cases"]:
        name, goals = case["case"], [goal_text(goal) for goal in case["goals"]]
        for row in case["rows"]:
            rows.append([name, *row_cells(row), goals.pop(0) if goals else ""])
            name = ""
        rows += [["", contender, f"absent: {why}", *blank] for contender, why in case["absent"].items()]
        rows += [["", "", "", *blank[1:], goal] for goal in goals]
    filled = [column for column in range(len(HEADER)) if any(row[column] for row in rows)]
    return [[row[column] for column in filled] for row in (HEADER, *rows)]


def facts(result: dict[str, Any]) -> str:
    """The machine, the versions, the date and the commit in one line."""
    versions = result["versions"]
    known = ", ".join(f"{package} {versions[package]}" for package in environment.PACKAGES if versions.get(package))
    commit = (result["commit"] or "unknown")[:10]
    return f"{environment.name(result['device'])}; {known}; {result['date'][:10]}, commit {commit}."


def markdown(result: dict[str, Any]) -> str:
    """The table for the README, under its facts."""
    header, *rows = table(result)
    lines = (header, ["---"] * len(header), *rows)
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{facts(result)}\n\n{text}"
