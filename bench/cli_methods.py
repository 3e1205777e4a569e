"""`python -m bench methods` and `tune`: what to choose, rather than how fast a kernel is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from . import environment, method_pick, method_table, tables, timing, tune
from .cli import (
    COLUMNS,
    Device,
    Dtype,
    Quick,
    Shapes,
    app,
    default_folder,
    errors,
    options,
    run_group,
    wide_console,
    write,
)
from .methods import METHODS, TINY
from .run import Plan
from .shapes import MODELS


@app.command()
def methods(
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, {TINY}")] = "smollm2-135m",
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    batch: Annotated[int, typer.Option(help="sequences in a batch")] = 2,
    sequence: Annotated[int, typer.Option(help="tokens in a sequence")] = 128,
    only: Annotated[str, typer.Option(help="methods, a comma-separated list; by default all")] = "",
    max_memory: Annotated[float, typer.Option(help="MiB of the model and a training step; 0: no limit")] = 0,
    max_overhead: Annotated[float, typer.Option(help="percent of slower inference; below 0: no limit")] = -1,
    tasks: Annotated[int, typer.Option(help="tasks that one base model serves")] = 1,
    quick: Quick = False,
    seconds: Annotated[float, typer.Option(help="how long to time each of a method's three comparisons")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="folder (bench/results/<device>; quick: build/bench)")] = None,
) -> None:
    """The PEFT methods beside each other on one base model, measured, and a pick for the given limits."""
    if model not in (*MODELS, TINY):
        raise typer.BadParameter(f"unknown model {model}; choose from {', '.join(MODELS)}, {TINY}")
    chosen = options(None, quick, device, dtype)
    effort = timing.QUICK if quick else timing.Effort(seconds, min_rounds=5)
    setting = method_table.Setting(model, chosen.device, chosen.dtype, effort, batch, sequence)
    names = [name.strip().lower() for name in only.split(",") if name.strip()]
    wanted = tuple(method for method in METHODS if not names or method.name.lower() in names)
    if not wanted:
        raise typer.BadParameter(f"unknown method {only}; choose from {', '.join(method.name for method in METHODS)}")
    path = (out or default_folder(chosen)) / "methods.json"
    for result in measure(setting, wanted, quick):
        write(result, path)
    header, *rows = method_pick.table(result)
    table = Table(*header, title=f"{model} on {environment.name(result['device'])}")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    memory = max_memory * 2**20 or None
    limits = method_pick.Limits(memory, max_overhead / 100 if max_overhead >= 0 else None, tasks)
    print(f"For {method_pick.advice(result, limits)}")
    errors.print(str(path))


def measure(setting: method_table.Setting, wanted: tuple[Any, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """The record of the table after each method, with a progress bar on the terminal."""
    facts = {field.name: str(getattr(setting, field.name)) for field in dataclasses.fields(setting)[:3]}
    facts |= {"batch": setting.batch, "sequence": setting.sequence}
    result = {"group": "methods", **environment.record(setting.device), "quick": quick, "setting": facts, "rows": []}
    with Progress(*COLUMNS, console=errors, transient=True) as progress:
        bar = progress.add_task("methods", total=len(wanted))
        for method in wanted:
            progress.update(bar, description=method.name)
            result["rows"].extend(method_table.rows(setting, (method,)))
            progress.advance(bar)
            yield result


@app.command(name="tune")
def tune_dispatch(
    op: Annotated[str, typer.Argument(metavar="OP", help=", ".join(tune.OPS))],
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    shapes: Shapes = None,
    quick: Quick = False,
    seconds: Annotated[float, typer.Option(help="how long to time a case")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="folder (bench/results/<device>; quick: build/bench)")] = None,
) -> None:
    """Measure where each kernel wins, and print the rows that the dispatcher's table should hold for this device."""
    if op not in tune.OPS:
        raise typer.BadParameter(f"unknown operation {op}; choose from {', '.join(tune.OPS)}")
    chosen = options(shapes, quick, device, dtype)
    if reason := tune.why_not(op, chosen.device):
        raise typer.BadParameter(reason)
    plan = Plan((timing.QUICK if quick else timing.FULL).lasting(seconds), chosen.device)
    for result in run_group(f"tune_{op}", list(tune.cases(op, chosen)), plan, quick):
        write(result, (out or default_folder(chosen)) / f"tune_{op}.json")
    where, ways = environment.name(result["device"]), tune.OPS[op].ways
    table = Table("case", "pass", *ways, "winner", title=f"{op} on {where}")
    for record in result["cases"]:
        for phase in tune.PHASES:
            found = tune.times(record, phase)
            cells = [tables.duration(found[way]) if way in found else "-" for way in ways]
            table.add_row(record["case"], phase, *cells, min(found, key=found.get) if found else "neither passed")
    wide_console().print(table)
    print(f"# {where}, {dtype}, {result['date'][:10]}: up to which {tune.OPS[op].size} {ways[0]} wins")
    print("\n".join(tune.named_rows(op, result["cases"])))
