"""What peft_kernels is compared with. Each peer is imported only where `missing()` finds it."""

from __future__ import annotations

import importlib.util


def missing(*packages: str) -> str | None:
    """Why a peer cannot run: the packages that are not installed, or None."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
