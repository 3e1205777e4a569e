"""What peft_kernels is compared with: thin files, each with NAME, why_not() and the functions that build its layers.

A peer's package is imported only inside those functions, so that an absent one is reported and hinders nothing.
"""

from __future__ import annotations

import importlib.util
import sys


def missing(*packages: str) -> str | None:
    """Why a peer cannot run: the packages that are not installed, or None."""
    absent = [name for name in packages if not sys.modules.get(name) and importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
