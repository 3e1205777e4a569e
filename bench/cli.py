"""`python -m bench`: measure, check, report."""

from __future__ import annotations

import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import environment, model, plots, tables, timing
from . import readme as readme_figures
from .case import Case, Options
from .cases import GROUPS
from .run import Plan, run_case
from .shapes import SETS

app = typer.Typer(
    help="Benchmarks of peft_kernels against its peers and its floors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True)
Selection = Annotated[
    list[str] | None, typer.Argument(metavar="[CASE]...", help="groups, or GROUP/PATTERN; by default all")
]
Shapes = Annotated[list[str] | None, typer.Option(help=f"the layers of {', '.join(SETS)}")]
Quick = Annotated[bool, typer.Option(help="small shapes and few rounds: does it work, not how fast")]
Device = Annotated[str, typer.Option(help="cpu, or a GPU: cuda")]
Dtype = Annotated[str, typer.Option(help="of the inputs")]


@app.command(name="list")
def list_cases(
    selection: Selection = None, shapes: Shapes = None, quick: Quick = False, device: Device = "cpu"
) -> None:
    """The groups and their cases."""
    for group, cases in selected(selection, options(shapes, quick, device, "bfloat16")):
        print(f"{group}: {GROUPS[group].__doc__}")
        print("".join(f"  {case.op}: {case.name}\n" for case in cases), end="")


@app.command()
def run(
    selection: Selection = None,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    shapes: Shapes = None,
    peers: Annotated[str, typer.Option(help="a comma-separated list, parts of names do; by default all")] = "",
    out: Annotated[Path | None, typer.Option(help="folder (bench/results/<device>; quick: build/bench)")] = None,
    quick: Quick = False,
    threads: Annotated[int, typer.Option(help="torch's threads; 0: its own choice")] = 0,
) -> None:
    """Check and time the cases; print tables, write JSON and plots."""
    if threads:
        torch.set_num_threads(threads)
    chosen = options(shapes, quick, device, dtype)
    names = [name.strip() for name in peers.split(",") if name.strip()]
    plan = Plan(
        timing.QUICK if quick else timing.FULL,
        chosen.device,
        lambda peer: not names or any(name in peer for name in names),
    )
    folder = out or default_folder(chosen)
    failed = False
    for group, cases in selected(selection, chosen):
        result = run_group(group, cases, plan, quick)
        path = write(result, folder)
        show(result)
        errors.print(f"{path} and its plot, after {result['elapsed_seconds']} s")
        if (result["load"] or 0) > 0.5 * result["device"]["cores"]:
            errors.print(f"The machine was busy before this began (load {result['load']:.1f}): repeat it when idle.")
        failed |= any(row["check"] == "failed" for case in result["cases"] for row in case["rows"])
    raise typer.Exit(1 if failed else 0)


@app.command(name="model")
def predict() -> None:
    """Predicted times on GPUs beside the measured ones."""
    model.main()


@app.command()
def readme() -> None:
    """Rewrite the README's figures from the committed JSON."""
    path = readme_figures.README
    path.write_text(readme_figures.updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def options(shapes: list[str] | None, quick: bool, device: str, dtype: str) -> Options:
    """The options; an unknown shape is an error."""
    if unknown := set(shapes or ()) - set(SETS):
        raise typer.BadParameter(f"unknown shapes {', '.join(sorted(unknown))}; choose from {', '.join(SETS)}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise typer.BadParameter(f"unknown dtype {dtype}; for example bfloat16 or float16")
    return Options(tuple(shapes or ()), quick, torch.device(device), getattr(torch, dtype))


def selected(selection: list[str] | None, chosen: Options) -> Iterator[tuple[str, list[Case]]]:
    """(group, cases) of the named groups; GROUP/PATTERN takes the cases whose name matches."""
    patterns: dict[str, list[str]] = {}
    for item in selection or GROUPS:
        group, _, pattern = item.partition("/")
        patterns.setdefault(group, []).append(pattern or "*")
    if unknown := set(patterns) - set(GROUPS):
        raise typer.BadParameter(f"unknown group {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    for group, wanted in patterns.items():
        cases = GROUPS[group](chosen)
        yield group, [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in wanted)]


def run_group(group: str, cases: list[Case], plan: Plan, quick: bool) -> dict[str, Any]:
    """The group's record, with a progress bar on the terminal."""
    started, record = time.perf_counter(), environment.record(plan.device)
    records = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        overall, detail = progress.add_task(group, total=len(cases)), progress.add_task("", total=1)
        for case in cases:

            def tick(what: str, done: int, total: int, name: str = case.name) -> None:
                progress.update(detail, description=f"{name}: {what}", completed=done, total=total)

            records.append(run_case(case, plan, tick))
            progress.advance(overall)
    elapsed = round(time.perf_counter() - started, 1)
    return {"group": group, **record, "quick": quick, "elapsed_seconds": elapsed, "cases": records}


def default_folder(chosen: Options) -> Path:
    """Where results go when no folder is named: a quick run proves nothing about speed and leaves no figures."""
    return (
        environment.ROOT / "build" / "bench" if chosen.quick else environment.RESULTS / environment.slug(chosen.device)
    )


def write(result: dict[str, Any], folder: Path) -> Path:
    """The JSON file of one group, and the plot beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['group']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots.ratios(result, path.with_suffix(".png"))
    return path


def show(result: dict[str, Any]) -> None:
    """The table, on the terminal."""
    header, *rows = tables.table(result)
    table = Table(title=f"{result['group']}: {environment.name(result['device'])}")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 180).print(table)
