"""ReplacementReport: what replace_layers did, for programs and for people."""

from __future__ import annotations

import dataclasses
import re

STATUSES = ("replaced", "base", "left", "excluded")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One layer that replace_layers looked at.

    name: its dotted name in the model. old_class: the class it had, qualified. new_class: the class it has now, or None
    where it was left alone. op and backend: the operation it calls and the backend that runs it here, or None;
    passed_over: for each faster backend that does not run it, why. reason: why it was left alone, or for a replaced
    layer why its calls go to the old class at the moment (adapters disabled or merged), or why its kernel is not known
    yet (parameters on the meta device); else None.
    status: "replaced"; "base", a 4-bit layer inside an adapter layer, replaced together with it; "left"; "excluded",
    left alone because `include` or `exclude` said so.
    """

    name: str
    old_class: str
    new_class: str | None
    op: str | None
    backend: str | None
    reason: str | None
    status: str
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def outcome(self) -> str:
        """The table's last column: the kernel, or why there is none."""
        if self.op is None:
            return f"{'' if self.new_class else 'left alone: '}{self.reason}"
        return f"{self.op}: {self.backend or 'no usable backend'}"


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What replace_layers did. `print(report)` shows a table in which like layers share a row.

    entries: one `Entry` for each layer that was looked at, in the model's order.
    """

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The layers that now run on our kernels (4-bit base layers inside an adapter layer are not counted again)."""
        return self._with_status("replaced")

    @property
    def left(self) -> tuple[Entry, ...]:
        """The layers that could not be replaced; each has a reason."""
        return self._with_status("left")

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by status."""
        return {status: len(self._with_status(status)) for status in STATUSES}

    def _with_status(self, status: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    def __repr__(self) -> str:
        return f"ReplacementReport({', '.join(f'{status}={n}' for status, n in self.counts.items())})"

    def __str__(self) -> str:
        counts = self.counts
        head = f"{counts['replaced']} layers replaced, {counts['left']} left alone"
        if counts["excluded"]:
            head += f", {counts['excluded']} excluded"
        if counts["base"]:
            head += f"; {counts['base']} 4-bit base layers went with their adapter layers"
        rows = [entry for entry in self.entries if entry.status != "base"]
        if not rows:
            none = "no Hugging Face PEFT adapter layer, no bitsandbytes 4-bit layer and no bottleneck adapter was found"
            return f"{head} ({none})"
        notes = {f"not {backend}: {why}" for entry in rows for backend, why in entry.passed_over}
        return "\n".join([head, *_columns(("layer", "class", "kernel, or why not"), _grouped(rows)), *sorted(notes)])


def _grouped(entries: list[Entry]) -> list[tuple[str, str, str]]:
    """Table rows; entries that differ only in the numbers in their names share one."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name)
        groups.setdefault((pattern, entry.old_class, entry.outcome), []).append(entry)
    rows = []
    for (pattern, old_class, outcome), members in groups.items():
        name = f"{pattern} ({len(members)} layers)" if len(members) > 1 else members[0].name or "(the model itself)"
        rows.append((name, old_class, outcome))
    return rows


def _columns(head: tuple[str, ...], rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of left-aligned columns."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
