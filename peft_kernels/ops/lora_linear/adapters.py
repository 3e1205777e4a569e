"""The active adapters of one LoRA layer, as lists of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...checks import bad_type, bad_value, check_device, check_shape, check_tensor


@dataclasses.dataclass
class Adapters:
    """Adapter i: A (r_i, K), B (N, r_i), scaling, bias of B (N,) or None, dropout probability."""

    lora_A: list[torch.Tensor]
    lora_B: list[torch.Tensor]
    scaling: list[float]
    lora_bias: list[torch.Tensor | None]
    dropout_p: list[float]

    @classmethod
    def parse(
        cls, lora_A: Any, lora_B: Any, scaling: Any, lora_bias: Any, dropout_p: float | Sequence[float], training: bool
    ) -> Adapters:
        """From the public arguments, where a single adapter may be given without a sequence."""
        single = isinstance(lora_A, torch.Tensor)
        a, b = ([lora_A], [lora_B]) if single else (_tensors("lora_A", lora_A), _tensors("lora_B", lora_B))
        n = len(a)
        p = _numbers("dropout_p", dropout_p, n)
        once = lora_bias is None or isinstance(lora_bias, torch.Tensor)
        bias = [lora_bias] * n if once else _tensors("lora_bias", lora_bias)
        if isinstance(scaling[0] if isinstance(scaling, (list, tuple)) and scaling else scaling, torch.Tensor):
            b, bias, scaling = _scaled(b, bias, scaling, n)
        s = _numbers("scaling", scaling, n)
        for name, values in (("lora_B", b), ("scaling", s), ("lora_bias", bias), ("dropout_p", p)):
            if len(values) != n:
                raise bad_value(name, f"{n} entries, one for each lora_A", len(values), "Give one per active adapter.")
        for value in p:
            if not 0 <= value <= 1:
                raise bad_value("dropout_p", "a probability from 0 to 1", value, "Check the adapter's configuration.")
        return cls(a, b, s, bias, p if training else [0.0] * n)

    def check(self, out_features: int, in_features: int, device: torch.device) -> None:
        """Shapes, dtypes and devices against a weight (N, K)."""
        for i, (a, b, lora_bias) in enumerate(zip(self.lora_A, self.lora_B, self.lora_bias, strict=True)):
            if lora_bias is None and _fits(a, b, out_features, in_features, device):
                continue
            check_tensor(f"lora_A[{i}]", a, 2)
            check_tensor(f"lora_B[{i}]", b, 2)
            rank = a.shape[0]
            if rank < 1:
                raise bad_value(f"lora_A[{i}]", "a rank of at least 1", rank, "Drop the adapter instead.")
            check_shape(f"lora_A[{i}]", a, (rank, in_features))
            check_shape(f"lora_B[{i}]", b, (out_features, rank))
            check_device(f"lora_A[{i}]", a, device)
            check_device(f"lora_B[{i}]", b, device)
            if lora_bias is not None:
                check_tensor(f"lora_bias[{i}]", lora_bias, 1)
                check_shape(f"lora_bias[{i}]", lora_bias, (out_features,))
                check_device(f"lora_bias[{i}]", lora_bias, device)

    def add_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The layer's bias with those of B added, scaled as B's output is."""
        for scaling, lora_bias in zip(self.scaling, self.lora_bias, strict=True):
            if lora_bias is not None:
                bias = scaling * lora_bias if bias is None else bias + scaling * lora_bias
        return bias

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None, float]]:
        return iter(zip(self.lora_A, self.lora_B, self.scaling, self.lora_bias, self.dropout_p, strict=True))


def _numbers(name: str, value: Any, n: int) -> list[float]:
    """One number for each of n adapters, from one for all of them or one for each."""
    if isinstance(value, (int, float)):  # not int | float: torch 2.6's compiler knows no unions
        return [float(value)] * n
    try:
        return [float(entry) for entry in value] if hasattr(value, "__len__") else [float(value)] * n
    except (TypeError, ValueError) as error:
        raise bad_type(name, "a number, or one for each adapter", value, "Give one per active adapter.") from error


def _tensors(name: str, value: Any) -> list:
    """One for each adapter."""
    if not isinstance(value, (list, tuple)) and not hasattr(value, "__iter__"):
        raise bad_type(name, "a torch.Tensor, or a sequence of them", value, "Give one per active adapter.")
    return list(value)


def _scaled(b: list, bias: list, scaling: Any, n: int) -> tuple[list, list, list]:
    """Scalings that are tensors, as PEFT's for compiled hot-swap, go into B: reading them would wait for a GPU."""
    each = [scaling] * n if isinstance(scaling, torch.Tensor) and scaling.ndim == 0 else list(scaling)
    if len(each) != n or len(b) != n or len(bias) != n:
        return b, bias, each  # whose count is refused below
    b = [(t * value).to(t.dtype) for t, value in zip(b, each, strict=True)]
    bias = [None if t is None else (t * value).to(t.dtype) for t, value in zip(bias, each, strict=True)]
    return b, bias, [1.0] * n


def _fits(a: Any, b: Any, out_features: int, in_features: int, device: torch.device) -> bool:
    """Whether `check` has nothing to say about these two: half of its time, at every call of every layer."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.ndim == b.ndim == 2):
        return False
    rank, columns = a.shape
    return (
        rank >= 1
        and columns == in_features
        and b.shape == (out_features, rank)
        and a.device == device == b.device
        and a.is_floating_point()
        and b.is_floating_point()
    )
