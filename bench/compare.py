"""Two results of the same group beside each other: what became faster or slower, and what moved with the machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from .tables import duration

NOISE = 0.10  # two runs of the same code agree on a ratio to this
HEADER = ["case", "contender", "before", "after", "before / after", "verdict"]


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, contender) -> its row, of those that were timed."""
    return {
        (case["case"], row["contender"]): row for case in result["cases"] for row in case["rows"] if "seconds" in row
    }


def gauge(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> dict[str, float]:
    """Case -> how much faster what is not ours became: what the machine, rather than the code, did."""
    gained: dict[str, list[float]] = {}
    for key in before.keys() & after.keys():
        if before[key]["kind"] != "ours":
            gained.setdefault(key[0], []).append(before[key]["seconds"]["p50"] / after[key]["seconds"]["p50"])
    return {case: statistics.median(values) for case, values in gained.items()}


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the comparison. Ours is judged after the machine's own change, the median of peers and floors."""
    before, after = rows_of(old), rows_of(new)
    machine = gauge(before, after)
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in before or key not in after:
            yield [
                *key,
                *(duration(rows[key]["seconds"]["p50"]) if key in rows else "" for rows in (before, after)),
                "",
                "",
            ]
            continue
        a, b = before[key]["seconds"]["p50"], after[key]["seconds"]["p50"]
        yield [*key, duration(a), duration(b), f"{a / b:.2f}", verdict(a / b, before[key]["kind"], machine.get(key[0]))]


def verdict(gain: float, kind: str, machine: float | None) -> str:
    """In a word, for our own rows."""
    if kind != "ours":
        return ""
    own = gain / machine if machine else gain
    if abs(own - 1) <= NOISE:
        return "the same"
    return f"{'faster' if own > 1 else 'SLOWER'}: {own:.2f} with the machine's change taken out"
