"""The report of a folder of results: one HTML file with its tables and plots in it, which needs no server."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2

from . import method_pick, plots, tables
from .profile import results

RATIOS = "Time of each contender over ours"
ROOFLINE = "Rate reached against operations per byte, under the measured ceilings"
TEMPLATE = Path(__file__).with_name("report.html.j2")


def image(draw: Any, result: dict[str, Any]) -> str:
    """A plot as a data URI."""
    buffer = io.BytesIO()
    draw(result, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def group(result: dict[str, Any]) -> dict[str, Any]:
    """The section of a group of cases."""
    images = {RATIOS: image(plots.ratios, result)}
    if plots.has_roofline(result):
        images[ROOFLINE] = image(plots.roofline, result)
    notes = dict.fromkeys(note for case in result["cases"] for note in case["notes"])
    texts = {"absent": tables.absent(result), "notes": notes, "goals": goals(result)}
    return {**section(result, tables.table(result)), **texts, "images": images}


def section(result: dict[str, Any], table: list[list[str]]) -> dict[str, Any]:
    """A table under the facts that belong to it."""
    header, *rows = table
    names = {"name": result["group"], "facts": tables.facts(result), "header": header, "rows": rows}
    return {**names, "absent": "", "notes": (), "goals": "", "images": {}}


def page(folder: Path) -> str:
    """The page; every plot is embedded."""
    groups = [group(result) for result in results(folder)]
    methods = folder / "methods.json"
    if methods.exists():
        result = json.loads(methods.read_text(encoding="utf-8"))
        groups.append(section(result, method_pick.table(result)) | {"notes": method_pick.picks(result)})
    if not groups:
        raise FileNotFoundError(f"{folder}: no results; `python -m bench run` writes some")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(folder=folder.name, groups=groups)


def goals(result: dict[str, Any]) -> str:
    """How many goals are met, in words; empty when there are none."""
    met = [goal["met"] for case in result["cases"] for goal in case["goals"]]
    return f"{met.count(True)} of {len(met)} goals met, {met.count(None)} not measured" if met else ""
