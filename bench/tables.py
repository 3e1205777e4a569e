"""A group's record as a table: for the terminal, for Markdown, for the report."""

from __future__ import annotations

from typing import Any

from . import environment

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
HEADER = [
    "case", "contender", "check", "time (p20 - p80)", "forward", "backward", "peak", "floor / time", "time / ours",
    "goals",
]  # fmt: skip


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    scale, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def spread(times: dict[str, float]) -> str:
    """p50 (p20 - p80)."""
    return f"{duration(times['p50'])} ({duration(times['p20'])} - {duration(times['p80'])})"


def size(nbytes: int | None) -> str:
    """In MiB; empty when unknown."""
    return "" if nbytes is None else f"{nbytes / 2**20:.3g} MiB" if nbytes < 1000 << 20 else f"{nbytes >> 20} MiB"


def row_cells(row: dict[str, Any], floor: float | None) -> list[str]:
    """The cells of a contender, between its case and the goals."""
    time, times, phases = row.get("seconds"), row.get("time_over_ours"), row.get("phases", {})
    spent = spread(time) if time else "-"
    apart = [duration(phases[name]["p50"]) if name in phases else "" for name in ("forward", "backward")]
    check = row["check"] if row["check"] != "failed" else f"failed: {row['why']}"
    peak = size(row.get("peak_memory_bytes"))
    reached = f"{floor / time['p50']:.0%}" if floor and time and row["kind"] != "floor" else ""
    return [row["contender"], check, spent, *apart, peak, reached, f"{times['p50']:.2f}" if times else ""]


def goal_text(goal: dict[str, Any]) -> str:
    """One goal in words: what, the bound, what was measured."""
    if goal["met"] is None:
        return f"{goal['goal']} {goal['bound']}: not measured"
    return f"{goal['goal']} {goal['bound']}: {goal['measured']['p50']:.2f}, {'met' if goal['met'] else 'NOT MET'}"


def table(result: dict[str, Any]) -> list[list[str]]:
    """The header and the rows; a column without content is left out."""
    rows: list[list[str]] = []
    for case in result["cases"]:
        name, goals = case["case"], [goal_text(goal) for goal in case["goals"]]
        for row in case["rows"]:
            rows.append([name, *row_cells(row, case.get("floor_seconds")), goals.pop(0) if goals else ""])
            name = ""
        rows += [[*[""] * (len(HEADER) - 1), goal] for goal in goals]
    filled = [column for column in range(len(HEADER)) if any(row[column] for row in rows)]
    return [[row[column] for column in filled] for row in (HEADER, *rows)]


def absent(result: dict[str, Any]) -> str:
    """The peers that did not compete and why, each once; empty when all did."""
    reasons = {f"{contender} ({why})": None for case in result["cases"] for contender, why in case["absent"].items()}
    return f"Absent: {'; '.join(reasons)}." if reasons else ""


def facts(result: dict[str, Any]) -> str:
    """The machine, the versions, the date and the commit in one line."""
    versions = result["versions"]
    known = ", ".join(f"{package} {versions[package]}" for package in environment.PACKAGES if versions.get(package))
    commit = (result["commit"] or "unknown")[:10]
    ceilings = result.get("ceilings")
    measured = f" Ceilings measured in the same run: {ceilings_text(ceilings)}." if ceilings else ""
    return f"{environment.name(result['device'])}; {known}; {result['date'][:10]}, commit {commit}.{measured}"


def ceilings_text(ceilings: dict[str, Any]) -> str:
    """What the machine reaches, with units."""
    memory, gemm = (_three_digits(ceilings[what] / 1e9) for what in ("bytes_per_second", "flops_per_second"))
    return f"{memory} GB/s ({ceilings['memory']}), {gemm} GFLOP/s ({ceilings['gemm']})"


def _three_digits(value: float) -> str:
    """Without an exponent."""
    return f"{float(f'{value:.3g}'):g}"


def markdown_table(table: list[list[str]]) -> str:
    """The header and the rows in Markdown."""
    header, *rows = table
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


SUMMARY = ["case", "ours", "peers and floors: time / ours", "peak memory", "goals"]


def summary(result: dict[str, Any]) -> list[list[str]]:
    """The header and one row for each case: our time, every other contender's over it, and the goals."""
    rows = []
    for case in result["cases"]:
        if not case["rows"]:  # nobody could compete
            continue
        ours = next((row for row in case["rows"] if row["kind"] == "ours"), case["rows"][0])
        others = [row for row in case["rows"] if row is not ours]
        ratios = [f"{row['contender']} {row['time_over_ours']['p50']:.2f}" for row in others if "time_over_ours" in row]
        ratios += [f"{row['contender']}: check failed" for row in case["rows"] if row["check"] == "failed"]
        peaks = [(row["contender"], row.get("peak_memory_bytes")) for row in (ours, *others) if row["kind"] != "floor"]
        memory = [f"{contender} {size(peak)}" for contender, peak in peaks if peak]
        time = duration(ours["seconds"]["p50"]) if "seconds" in ours else "-"
        goals = [goal_text(goal) for goal in case["goals"]]
        rows.append([case["case"], time, "; ".join(ratios), "; ".join(memory), "; ".join(goals)])
    return [SUMMARY, *rows]


def markdown(result: dict[str, Any]) -> str:
    """The table for the README, under its facts."""
    parts = (facts(result), markdown_table(summary(result)), absent(result))
    return "\n\n".join(part for part in parts if part)
