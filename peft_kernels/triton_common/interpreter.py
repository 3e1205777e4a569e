"""Makes Triton 3.6's CPU interpreter work beside NumPy 2.4, and patch `triton.language` once a launch.

NumPy 2.4 refuses int() of a one-element array.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


def mend() -> None:
    """Apply both."""
    _index_scalars()
    _patch_once()


def _index_scalars() -> None:
    """Scalars, which the interpreter holds as one-element arrays, can bound a loop again."""
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


def _patch_once() -> None:
    """A call of a device function finds what the launch has patched, rather than patching all of it again."""
    patch = interpreter._patch_lang
    patched: list[Any] = []  # the modules, during a launch

    def patch_what_is_not(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        missing = [m for m in modules if m in (interpreter.tl, interpreter.tl.core) and m not in patched]
        if patched and not missing:
            return interpreter._LangPatchScope()
        scope, outermost = patch(function), not patched
        patched.extend(missing)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.clear()
            restore()

        if outermost:
            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_what_is_not
