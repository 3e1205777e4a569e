"""The method table in words, and the row to take within given limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import tables

Row = dict[str, Any]
HEADER = [
    "method", "way", "trained", "adapter file", "training step (p20 - p80)", "training memory",
    "inference (p20 - p80), over base", "merges", "after merging",
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a pick must keep to: bytes of memory while training, inference overhead, tasks served by one base."""

    memory: float | None = None
    overhead: float | None = None
    tasks: int = 1


def pick(rows: list[Row], limits: Limits) -> Row | None:
    """The row to take within the limits, or None.

    Quality is not measured here; how many parameters a method trains is the room that it has to fit a task. Of the rows
    within the limits that train at least half as many as the one that trains the most, the fastest to train is taken.
    """
    fitting = [row for row in rows if "why_not" not in row and within(row, limits)]
    most = max((row["trainable"] for row in fitting), default=0)
    roomy = [row for row in fitting if 2 * row["trainable"] >= most]
    return min(roomy, key=lambda row: row["step_seconds"]["p50"], default=None)


def within(row: Row, limits: Limits) -> bool:
    """Whether the row keeps to the limits. One task can be merged; several share the base and cannot."""
    total = memory_bytes(row) + (limits.tasks - 1) * row["adapter_bytes"]
    merged = row["merge"].get("overhead") if limits.tasks == 1 else None
    overhead = row["overhead"]["p50"] if merged is None else min(merged, row["overhead"]["p50"])
    return (limits.memory is None or total <= limits.memory) and (
        limits.overhead is None or overhead <= limits.overhead
    )


def memory_bytes(row: Row) -> int:
    """The model, the optimizer's state, and what a training step takes beyond them."""
    return row["model_bytes"] + row["optimizer_bytes"] + (row["step_peak_bytes"] or 0)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if "why_not" in row:
        return [row["method"], row["way"], row["why_not"], *[""] * (len(HEADER) - 3)]
    merge = row["merge"]
    left = f"{merge['overhead']:+.0%}, {merge['parameters']:,} parameters more, " if merge["merges"] else ""
    left += f"logits off by {merge['error']:.1%} (before: {merge['rounding']:.1%})" if merge["merges"] else ""
    return [
        row["method"],
        row["way"],
        f"{row['trainable']:,}",
        tables.size(row["adapter_bytes"]),
        tables.spread(row["step_seconds"]),
        tables.size(memory_bytes(row)),
        f"{tables.spread(row['inference_seconds'])}, {row['overhead']['p50']:+.0%}",
        "yes" if merge["merges"] else "no",
        left,
    ]


def table(result: dict[str, Any]) -> list[list[str]]:
    """The header and the rows."""
    return [HEADER, *map(cells, result["rows"])]


def describe(limits: Limits) -> str:
    """The limits in words."""
    parts = [f"{limits.tasks} task{'s' if limits.tasks > 1 else ''}"]
    parts += [f"at most {tables.size(int(limits.memory))} of memory"] if limits.memory else []
    parts += [f"at most {limits.overhead:.0%} slower inference"] if limits.overhead is not None else []
    return ", ".join(parts)


def advice(result: dict[str, Any], limits: Limits) -> str:
    """The pick in a sentence."""
    row = pick(result["rows"], limits)
    return f"{describe(limits)}: " + (f"{row['method']}, {row['way']}" if row else "no measured row keeps to it")


def picks(result: dict[str, Any]) -> list[str]:
    """The setting, the rule, and the picks for some limits, made from the table's own figures."""
    setting = result["setting"]
    over = f"{setting['model']}, {setting['batch']} x {setting['sequence']} tokens, {setting['dtype']}."
    rule = "Of the rows within the limits that train at least half as many parameters as the one that trains the most, "
    rule += "the fastest to train (quality is not measured here):"
    return [over, rule, *(advice(result, limits) for limits in examples(result["rows"]))]


def markdown(result: dict[str, Any]) -> str:
    """The table for the README."""
    over, rule, *found = picks(result)
    lines = "\n".join(f"- {pick}" for pick in found)
    return "\n\n".join((tables.facts(result), over, tables.markdown_table(table(result)), rule, lines))


def examples(rows: list[Row]) -> list[Limits]:
    """Limits that a reader may have: none, one merged task, many tasks, and the smaller half of the memory."""
    used = sorted(memory_bytes(row) for row in rows if "why_not" not in row)
    half = [Limits(memory=used[len(used) // 2])] if used else []
    return [Limits(), Limits(overhead=0.03), Limits(overhead=0.25, tasks=100), *half]
