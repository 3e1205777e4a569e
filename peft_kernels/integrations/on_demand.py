"""Tensors that are computed when they are first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

# What only moves elements stays on demand: the `adapters` library slices, repeats and joins results that it then drops.
_MOVES = {torch.Tensor.__getitem__, torch.Tensor.repeat, torch.cat}


class OnDemand(torch.Tensor):
    """A result that an interface promises and its callers seldom read: any use computes it, once."""

    _compute: Callable[[], torch.Tensor]
    _value: torch.Tensor | None

    @staticmethod
    def of(compute: Callable[[], torch.Tensor]) -> OnDemand:
        """The tensor that compute() returns, which must not depend on when it is called."""
        tensor = torch.empty(0).as_subclass(OnDemand)
        tensor._compute, tensor._value = compute, None
        return tensor

    def value(self) -> torch.Tensor:
        """The tensor itself."""
        if self._value is None:
            self._value = self._compute()
            del self._compute
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def compute() -> Any:
            values, options = tree_map_only(OnDemand, OnDemand.value, (args, kwargs or {}))
            return func(*values, **options)

        return OnDemand.of(compute) if func in _MOVES else compute()
