"""`python -m bench`: measure, check, report."""

from __future__ import annotations

import dataclasses
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

from . import aot as compiled
from . import ceilings, environment, html, plots, profile, tables, timing
from . import compare as comparison
from . import readme as readme_figures
from .case import Case, Options
from .cases import GROUPS
from .run import Plan, broken, run_case
from .shapes import SETS

app = typer.Typer(
    help="Benchmarks of peft_kernels against its peers and its floors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True)
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
    compiled: Annotated[bool, typer.Option(help="with the peers under torch.compile; never in quick runs")] = True,
    seconds: Annotated[float, typer.Option(help="how long to time a case; 0: its own choice")] = 0,
) -> None:
    """Check and time the cases; print tables, write JSON and plots."""
    if threads:
        torch.set_num_threads(threads)
    chosen = dataclasses.replace(options(shapes, quick, device, dtype), compiled=compiled and not quick)
    names = [name.strip() for name in peers.split(",") if name.strip()]
    effort = timing.QUICK if quick else timing.FULL
    plan = Plan(
        effort.lasting(seconds) if seconds else effort,
        chosen.device,
        lambda peer: not names or any(name in peer for name in names),
        ceilings.of(chosen.device, chosen.dtype, quick),
    )
    folder = out or default_folder(chosen)
    failed = False
    for group, cases in selected(selection, chosen):
        path = folder / f"{group}.json"
        for result in run_group(group, cases, plan, quick):
            write(result, path)
        plots.ratios(result, path.with_suffix(".png"))
        show(result)
        errors.print(f"{path} and its plot, after {result['elapsed_seconds']} s")
        if (result["load"] or 0) > 0.5 * result["device"]["cores"]:
            errors.print(f"The machine was busy before this began (load {result['load']:.1f}): repeat it when idle.")
        failed |= any(row["check"] == "failed" for case in result["cases"] for row in case["rows"])
    raise typer.Exit(1 if failed else 0)


@app.command()
def readme() -> None:
    """Rewrite the README's figures from the committed JSON."""
    path = readme_figures.README
    path.write_text(readme_figures.updated(path.read_text(encoding="utf-8")), encoding="utf-8")


@app.command()
def aot() -> None:
    """Compile every GPU kernel for every target without a GPU; write the table that the tests hold."""
    before, rows = compiled.committed()["rows"], []
    table = Table("target", "launch", "registers", "spills", "shared", "matrix", "SASS / weight", "against the table")
    with Progress(*COLUMNS, console=errors, transient=True) as progress:
        for row in progress.track(compiled.all_rows(), description="compiling"):
            rows.append(row)
            figures = ["" if row[what] is None else str(row[what]) for what in compiled.NOT_MORE[:4]]
            change = "; ".join(compiled.worse(row, before.get((row["target"], row["launch"]))))
            table.add_row(row["target"], row["launch"], *figures[:3], ", ".join(row["matrix"]), figures[3], change)
    wide_console().print(table)
    compiled.write(rows)
    errors.print(f"{len(rows)} rows in {compiled.PATH}")


@app.command(name="ceilings")
def measure_ceilings(
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    quick: Quick = False,
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Measure what memory and the vendor's GEMM reach here."""
    chosen = options(None, quick, device, dtype)
    found = ceilings.of(chosen.device, chosen.dtype, quick)
    print(f"{environment.name(environment.machine(chosen.device))}: {tables.ceilings_text(found)}")
    if out:
        out.write_text(json.dumps({**environment.record(chosen.device), "ceilings": found}, indent=1), encoding="utf-8")


@app.command(name="profile")
def profile_worst(
    folder: Annotated[Path, typer.Argument(help="results of a run")],
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    shapes: Shapes = None,
    quick: Quick = False,
    calls: Annotated[int, typer.Option(help="calls to profile")] = 10,
) -> None:
    """Rank the cases of a run, the worst first, and show where the time of the worst goes."""
    ranked = profile.ranked(folder)
    for score, group, name in ranked[:3]:
        print(f"{score:.2f} of its goal, or of a peer's speed: {group}: {name}")
    if ranked:
        _, group, name = ranked[0]
        chosen = options(shapes, quick, device, dtype)
        print(profile.kernels(profile.find(group, name, chosen), chosen.device, calls))


@app.command()
def compare(old: Path, new: Path) -> None:
    """Two results of the same group beside each other; exits with 1 when something of ours became slower."""
    pair = [json.loads(path.read_text(encoding="utf-8")) for path in (old, new)]
    table = Table(*comparison.HEADER, title=f"{pair[0]['group']}: {old} and {new}")
    rows = list(comparison.changes(*pair))
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    raise typer.Exit(1 if any("SLOWER" in row[-1] for row in rows) else 0)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="results of a run")]) -> None:
    """Write DIR/report.html: every table and plot in one file that opens without a server."""
    path = folder / "report.html"
    path.write_text(html.page(folder), encoding="utf-8")
    print(path)


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
        named = [case for case in GROUPS[group](chosen) if any(fnmatch.fnmatchcase(case.name, p) for p in wanted)]
        if not named:
            raise typer.BadParameter(f"{group} has no case like {', '.join(wanted)}: see `python -m bench list`")
        yield group, named


def run_group(group: str, cases: list[Case], plan: Plan, quick: bool) -> Iterator[dict[str, Any]]:
    """The group's record after each of its cases, with a progress bar on the terminal."""
    started = time.perf_counter()
    result = {"group": group, **environment.record(plan.device), "quick": quick, "ceilings": plan.ceilings, "cases": []}
    with Progress(*COLUMNS, console=errors, transient=True) as progress:
        overall, detail = progress.add_task(group, total=len(cases)), progress.add_task("", total=1)
        for case in cases:

            def tick(what: str, done: int, total: int, name: str = case.name) -> None:
                progress.update(detail, description=f"{name}: {what}", completed=done, total=total)

            try:
                result["cases"].append(run_case(case, plan, tick))
            except Exception as error:  # the cases after it still run, and those before it are kept
                result["cases"].append(broken(case, error))
            progress.advance(overall)
            result["elapsed_seconds"] = round(time.perf_counter() - started, 1)
            yield result


def default_folder(chosen: Options) -> Path:
    """Where results go when no folder is named: a quick run proves nothing about speed and leaves no figures."""
    return (
        environment.ROOT / "build" / "bench" if chosen.quick else environment.RESULTS / environment.slug(chosen.device)
    )


def write(result: dict[str, Any], path: Path) -> None:
    """The JSON file of one group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(result: dict[str, Any]) -> None:
    """The table, on the terminal."""
    header, *rows = tables.table(result)
    title = f"{result['group']}: {environment.name(result['device'])}"
    table = Table(title=title, caption=tables.absent(result), caption_justify="left")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)


def wide_console() -> Console:
    """Standard output, wide enough for a table when it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 180)
