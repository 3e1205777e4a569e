"""The report of a folder of results: one HTML file with its tables and plots in it, which needs no server."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2

from . import plots, tables
from .profile import results

RATIOS = "Time of each contender over ours"
ROOFLINE = "Rate reached against operations per byte, under the measured ceilings"
TEMPLATE = Path(__file__).with_name("report.html.j2")


def image(draw: Any, result: dict[str, Any]) -> str:
    """A plot as a data URI."""
    buffer = io.BytesIO()
    draw(result, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(folder: Path) -> str:
    """The page; every plot is embedded."""
    groups = []
    for result in results(folder):
        header, *rows = tables.table(result)
        images = {"Time of each contender over ours": image(plots.ratios, result)}
        if plots.has_roofline(result):
            images["Reached rate against arithmetic intensity, under the measured ceilings"] = image(
                plots.roofline, result
            )
        facts, absent = tables.facts(result), tables.absent(result)
        notes = dict.fromkeys(note for case in result["cases"] for note in case["notes"])
        names = {"name": result["group"], "facts": facts, "absent": absent, "notes": notes}
        groups.append(names | {"header": header, "rows": rows, "images": images, "goals": goals(result)})
    if not groups:
        raise FileNotFoundError(f"{folder}: no results; `python -m bench run` writes some")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(folder=folder.name, groups=groups)


def goals(result: dict[str, Any]) -> str:
    """How many goals are met, in words; empty when there are none."""
    met = [goal["met"] for case in result["cases"] for goal in case["goals"]]
    return f"{met.count(True)} of {len(met)} goals met, {met.count(None)} not measured" if met else ""
