"""Which layers a caller means: patterns for their names, or callables."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

from torch import nn

from ..checks import bad_type, bad_value

Filter = str | Callable[[str, nn.Module], bool]


def parse_filters(argument: str, value: Filter | Iterable[Filter] | None) -> list[Filter]:
    """The filters as a list; a single one may be given without one."""
    filters = [] if value is None else [value] if isinstance(value, str) or callable(value) else list(value)
    for item in filters:
        if not (isinstance(item, str) or callable(item)):
            raise bad_type(argument, "name patterns or callables (name, module) -> bool", item, "See replace_layers.")
    return filters


def matches(filters: list[Filter], name: str, module: nn.Module) -> bool:
    """Whether any of the filters means this module."""
    for item in filters:
        if not isinstance(item, str):
            if item(name, module):
                return True
        elif fnmatch.fnmatchcase(name, item) or fnmatch.fnmatchcase(name, f"*.{item}"):
            return True
    return False


def check_patterns(argument: str, filters: list[Filter], candidates: list[tuple[str, nn.Module]]) -> None:
    """A pattern that matches nothing is a misspelling."""
    for item in filters:
        if isinstance(item, str) and not any(matches([item], name, module) for name, module in candidates):
            names = ", ".join(name for name, _ in candidates[:4] if name)
            remedy = "A pattern matches the dotted name or a tail of it that starts after a dot."
            raise bad_value(
                argument, f"patterns that match a layer (such as {names or 'none here'})", repr(item), remedy
            )
