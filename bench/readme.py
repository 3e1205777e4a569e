"""The README's figure tables, generated from committed JSON so that no figure is typed by hand.

A table stands between `<!-- figures: bench/results/<device>/<group>.json -->` and `<!-- end figures -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import method_pick, tables
from .environment import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- figures: (?P<path>\S+\.json) -->\n)(?P<table>.*?)(<!-- end figures -->)", re.DOTALL)


def sources(text: str) -> list[str]:
    """The JSON files that the text takes its tables from."""
    return [match["path"] for match in BLOCK.finditer(text)]


def updated(text: str, root: Path = ROOT) -> str:
    """The text with every table made anew; a table whose JSON is absent stays."""

    def table(match: re.Match[str]) -> str:
        path = root / match["path"]
        if not path.exists():
            return match[0]
        return f"{match[1]}\n{markdown(path)}\n\n{match[4]}"

    return BLOCK.sub(table, text)


def markdown(path: Path) -> str:
    """The table of one JSON."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return method_pick.markdown(result) if result["group"] == "methods" else tables.markdown(result)
