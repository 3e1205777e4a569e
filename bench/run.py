"""Runs a case: check, time, ratios, goals. No contender is timed that its check did not pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import memory
from .case import OURS, Case, Goal, Work
from .ceilings import floor_seconds
from .timing import CPU, Effort, measure, quantiles, ratio

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """How to run a case: how long, where, against which peers, and under which measured ceilings."""

    effort: Effort
    device: torch.device = CPU
    wanted: Callable[[str], bool] = lambda name: True
    ceilings: dict[str, Any] | None = None


def run_case(case: Case, plan: Plan, tick: Tick = lambda what, done, total: None) -> dict[str, Any]:
    """The case's record for the report: one row for each contender, the absent ones, the goals.

    Args:
        tick: called with (what is being done, steps done, steps in all).
    """
    tick("preparing", 0, 1)
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what libraries hold is not searched again at every measurement of memory
    work = case.build(plan.wanted)
    rows = {name: check(work, name, tick) for name in work.contenders}
    sound = [name for name, row in rows.items() if row["check"] != "failed"]
    calls = {name: work.contenders[name].calls for name in sound}
    times = measure(calls, plan.effort, lambda done, total: tick("timing", done, total), plan.device)
    base = OURS if OURS in times else next((name for name in times if rows[name]["kind"] == "ours"), None)
    for name, samples in times.items():
        rows[name] |= {"seconds": {"best": min(samples), **quantiles(samples)}, "rounds": len(samples)}
        if base is not None and name != base:
            rows[name]["time_over_ours"] = {"ours": base, **ratio(samples, times[base])}
    for name in sound:
        tick(f"memory of {name}", 0, 1)
        peak = work.memory(name) if work.memory else memory.of_call(work.contenders[name].calls[0], plan.device)
        rows[name]["peak_memory_bytes"] = peak
    add_phases(work, sound, rows, plan, tick)
    return {
        "case": case.name,
        "op": case.op,
        "shape": case.shape,
        "flops": case.flops,
        "nbytes": case.nbytes,
        "floor_seconds": floor_seconds(plan.ceilings, case.flops, case.nbytes) if plan.ceilings else None,
        "rows": list(rows.values()),
        "absent": work.absent,
        "notes": work.notes,
        "goals": [judge(goal, rows, times) for goal in case.goals],
    }


def broken(case: Case, error: Exception) -> dict[str, Any]:
    """The record of a case that could not be run to its end."""
    row = {"contender": OURS, "kind": "ours", "check": "failed", "why": f"{type(error).__name__}: {error}"}
    facts = {"case": case.name, "op": case.op, "shape": case.shape, "flops": case.flops, "nbytes": case.nbytes}
    return facts | {"floor_seconds": None, "rows": [row], "absent": {}, "notes": [], "goals": []}


def check(work: Work, name: str, tick: Tick) -> dict[str, Any]:
    """The contender's row, with what its check found: passed, failed, or floor (another computation: no check)."""
    tick(f"checking {name}", 0, 1)
    kind = work.contenders[name].kind
    row = {"contender": name, "kind": kind, "check": "floor" if kind == "floor" else "passed"}
    try:
        work.check(name)
    except Exception as error:  # whatever goes wrong in a contender is its result, and the others still run
        row |= {"check": "failed", "why": f"{type(error).__name__}: {error}"}
    return row


def add_phases(work: Work, sound: list[str], rows: dict[str, dict[str, Any]], plan: Plan, tick: Tick) -> None:
    """Put the times of the forward and the backward pass apart, where the contenders have them, into their rows."""
    for phase in dict.fromkeys(phase for name in sound for phase in work.contenders[name].phases):
        calls = {name: work.contenders[name].phases[phase] for name in sound if phase in work.contenders[name].phases}
        effort = plan.effort.lasting(plan.effort.seconds / 4)
        for name, samples in measure(calls, effort, lambda d, n, p=phase: tick(p, d, n), plan.device).items():
            rows[name].setdefault("phases", {})[phase] = quantiles(samples)


def judge(goal: Goal, rows: dict[str, dict[str, Any]], times: dict[str, list[float]]) -> dict[str, Any]:
    """The goal, what was measured (p50 of the ratio over rounds, with p20 and p80), and whether it is met."""
    sign, bound = (">=", goal.at_least) if goal.at_least is not None else ("<=", goal.at_most)
    record = {"goal": f"{goal.measure} of {goal.over} / {goal.under}", "bound": f"{sign} {bound:g}"}
    measured = None
    if goal.measure == "time" and goal.over in times and goal.under in times:
        measured = ratio(times[goal.over], times[goal.under])
    elif goal.measure == "peak memory":
        over, under = (rows.get(name, {}).get("peak_memory_bytes") for name in (goal.over, goal.under))
        measured = quantiles([over / under]) if over and under else None
    met = None
    if measured is not None:
        met = measured["p50"] >= bound if sign == ">=" else measured["p50"] <= bound
    return record | {"measured": measured, "met": met}
