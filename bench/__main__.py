"""`python -m bench`: measure, check, report.

python -m bench                                  every group at full length
python -m bench lora_linear codec --quick        a small shape, seconds in all
python -m bench linear_4bit --shapes llama-3.2-1b
python -m bench --readme                         rewrite the README's tables from the committed JSON
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import readme, report, timing
from .cases import GROUPS
from .run import run_case
from .shapes import SHAPES

errors = Console(stderr=True)


def run_group(group: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every case of a group, with a progress bar on the terminal."""
    effort = timing.QUICK if args.quick else timing.FULL
    started, environment = time.perf_counter(), report.environment()
    cases = list(GROUPS[group](args.shapes, args.quick))
    records = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        overall, detail = progress.add_task(group, total=len(cases)), progress.add_task("", total=1)
        for case in cases:

            def tick(what: str, done: int, total: int, name: str = case.name) -> None:
                progress.update(detail, description=f"{name}: {what}", completed=done, total=total)

            records.append(run_case(case, effort, tick))
            progress.advance(overall)
    elapsed = round(time.perf_counter() - started, 1)
    return {"group": group, **environment, "quick": args.quick, "elapsed_seconds": elapsed, "cases": records}


def show(result: dict[str, Any]) -> None:
    """The table, on the terminal."""
    table = Table(title=f"{result['group']}: {result['device']['cpu']}, {result['device']['threads']} threads")
    for column in report.header():
        table.add_column(column, overflow="fold")
    for line in report.lines(result):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"from {', '.join(GROUPS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does it work, not how fast")
    parser.add_argument("--out", type=Path, help="where JSON and plots go (bench/results/<device>; quick: build/bench)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="the layers of these models instead")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--readme", action="store_true", help="measure nothing; rewrite the README's tables")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    return args


def main() -> int:
    args = parse()
    if args.readme:
        readme.README.write_text(readme.updated(readme.README.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.out or (report.ROOT / "build" / "bench" if args.quick else report.RESULTS / report.device_slug())
    results = []
    for group in args.groups or GROUPS:
        results.append(run_group(group, args))
        path = report.write(results[-1], folder)
        if not args.json:
            show(results[-1])
        errors.print(f"{path} and its plot, after {results[-1]['elapsed_seconds']} s")
        load = results[-1]["load"] or 0
        if load > 0.5 * results[-1]["device"]["cores"]:
            errors.print(f"The machine was busy before this began (load {load:.1f}): repeat it when idle.")
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    rows = [row for result in results for case in result["cases"] for row in case["rows"]]
    return 1 if any(row["check"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
