"""Profiles the case of a visit whose ratio is the worst: where its time goes, kernel by kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .case import OURS, Case, Options
from .cases import GROUPS

ROWS = 30


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """The group records of a folder; other JSON files there are passed over."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("group") in GROUPS:
            yield record


def attainment(case: dict[str, Any]) -> float | None:
    """The smallest share of a goal that was reached; without measured goals, the smallest peer's time over ours."""
    shares = [share(goal) for goal in case["goals"] if goal["measured"]]
    peers = [row["time_over_ours"]["p50"] for row in case["rows"] if row["kind"] == "peer" and "time_over_ours" in row]
    return min(shares or peers, default=None)


def share(goal: dict[str, Any]) -> float:
    """How much of the goal was reached: 1 and more is met."""
    sign, bound = goal["bound"].split()
    measured = goal["measured"]["p50"]
    return measured / float(bound) if sign == ">=" else float(bound) / measured


def ranked(folder: Path) -> list[tuple[float, str, str]]:
    """(attainment, group, case), the worst first."""
    found = [
        (attainment(case), record["group"], case["case"]) for record in results(folder) for case in record["cases"]
    ]
    return sorted((score, group, case) for score, group, case in found if score is not None)


def find(group: str, name: str, options: Options) -> Case:
    """The case of that name."""
    return next(case for case in GROUPS[group](options) if case.name == name)


def kernels(case: Case, device: torch.device, calls: int) -> str:
    """The table of where our time goes in `calls` calls."""
    work = case.build(lambda peer: False)
    name = OURS if OURS in work.contenders else next(n for n, c in work.contenders.items() if c.kind == "ours")
    call = work.contenders[name].calls[0]
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CPU] + ([] if device.type == "cpu" else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        for _ in range(calls):
            call()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return found.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=80)
