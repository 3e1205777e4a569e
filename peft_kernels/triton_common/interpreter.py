"""Makes Triton 3.6's CPU interpreter work beside NumPy 2.4, which refuses int() of a one-element array."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def mend() -> None:
    """Scalars, which the interpreter holds as one-element arrays, can bound a loop again."""
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index
