"""Hugging Face PEFT's LoRA layer on `lora_linear`; the methods but `forward` are PEFT's own."""

from __future__ import annotations

from typing import Any

import peft.tuners.lora.layer as lora
import torch
from torch import nn

from .. import dispatch
from ..checks import autocasts
from ..functional import lora_linear
from .base_layer import PLAIN, dense_base, four_bit_weight, hooked, overridden
from .replace import Undo, why_base_not


class FusedAdapter:
    """What the fused classes of PEFT's adapter layers share."""

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why no call of this layer can be served, or None. What one call lacks is found out by that call."""
        reason = overridden(layer)
        if reason is not None:
            return f"its {reason}"
        base = layer._modules["base_layer"]
        reason = overridden(base) if type(base) is nn.Linear else why_base_not(base)
        if reason is not None:
            return reason if type(base) is not nn.Linear else f"its base layer's {reason}"
        return None

    @staticmethod
    def _prepare(layer: Any) -> list[Undo]:
        return []

    @property
    def _input_dtype(self) -> torch.dtype:
        base = self._modules["base_layer"]  # type: ignore[attr-defined]
        return base.weight.dtype if type(base) is nn.Linear else base._input_dtype

    def _left_to_peft(self: Any, reason: str) -> None:
        """Tell `explain` why this call goes to PEFT's forward."""
        if dispatch.recording():
            mutates = self.merged and self.disable_adapters  # PEFT would unmerge it: explaining must stop here
            dispatch.note(f"{type(self).__bases__[-1].__qualname__}: left to PEFT: {reason}", final=mutates)


class FusedLoRA(FusedAdapter):
    """`forward` for a PEFT LoRA layer: one kernel where there is one, PEFT's forward for all else."""

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """As for any adapter layer; and an adapter must have a kernel."""
        reason = FusedAdapter.why_not(layer)
        if reason is not None:
            return reason
        adapters = [_adapter(layer, name) for name in layer.lora_A]
        if adapters and all(isinstance(adapter, str) for adapter in adapters):
            return adapters[0]
        return None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N), with the casts, the dropout and the adapters that PEFT's forward would use."""
        call = _gather(self, x) if not (args or kwargs) else besides(kwargs)
        if isinstance(call, str):
            self._left_to_peft(call)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        x, weight, bias, lora_A, lora_B, scaling, lora_bias, dropout_p, out_dtype = call
        y = lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, lora_bias=lora_bias, dropout_p=dropout_p)
        return y if out_dtype is None else y.to(out_dtype)


class FusedLinear(FusedLoRA, lora.Linear):
    """`peft.tuners.lora.Linear` over nn.Linear, or over a 4-bit layer that the model does not declare."""


def besides(kwargs: dict) -> str:
    """The reason that a call with more than x has."""
    return f"it was given arguments besides x ({', '.join(kwargs)})"


def why_not_now(layer: Any, x: torch.Tensor) -> str | None:
    """Why this call of an adapter layer cannot be served, whatever its adapters are; or None."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged into the base layer"
    if type(x) not in PLAIN or not x.is_floating_point():
        return f"x is a {type(x).__name__} of {getattr(x, 'dtype', 'no dtype')}"
    if hooked(layer._modules["base_layer"]):
        return "the base layer has hooks"
    return None


def _adapter(layer: Any, name: str) -> Any:
    """A, B, scaling, bias of B and dropout probability of one adapter, or why it has no kernel."""
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        return f"there is no kernel for adapter {name!r}, a {variant.removesuffix('LinearVariant')} variant of LoRA"
    modules = layer._modules
    a: Any = modules["lora_A"]._modules[name]
    b: Any = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    kind = type(dropout)
    if kind is nn.Identity:
        p = 0.0
    elif kind is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
    else:
        return f"adapter {name!r} has a dropout of class {kind.__name__}"
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"adapter {name!r} is made of {type(a).__name__} and {type(b).__name__}, not of nn.Linear"
    if hooked(a) or hooked(b) or hooked(dropout):
        return f"a module of adapter {name!r} has hooks"
    weight_a: Any = a._parameters.get("weight")
    weight_b: Any = b._parameters.get("weight")
    if type(weight_a) not in PLAIN or type(weight_b) not in PLAIN:
        return f"a weight of adapter {name!r} is a {type(weight_a).__name__}, which is gathered by its module's forward"
    if weight_a.dtype is not weight_b.dtype:
        return f"adapter {name!r} has A in {weight_a.dtype} and B in {weight_b.dtype}"
    return weight_a, weight_b, layer.scaling[name], b._parameters["bias"], p


def _gather(layer: Any, x: torch.Tensor) -> Any:
    """What `lora_linear` takes, and the dtype to cast its result to (None: as it comes); or why it cannot be called."""
    reason = why_not_now(layer, x)
    if reason is not None:
        return reason
    base = layer._modules["base_layer"]
    adapters = []
    lora_A = layer._modules["lora_A"]._modules
    for name in layer.active_adapters:
        if name in lora_A:
            adapter = _adapter(layer, name)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
    if not adapters:
        return "it has none of the active adapters"
    a, b, scaling, lora_bias, dropout_p = zip(*adapters)  # noqa: B905 (lengths are equal, and this runs at every call)
    if not layer.cast_input_dtype_enabled and any(weight.dtype is not x.dtype for weight in a):
        return "the cast of x to the adapter's dtype is disabled"
    served = dense_base(base, x) if type(base) is nn.Linear else _four_bit(base, x, a)
    if isinstance(served, str):
        return served
    x, weight, out_dtype = served
    return x, weight, base._parameters["bias"], a, b, scaling, lora_bias, dropout_p, out_dtype


def _four_bit(base: Any, x: torch.Tensor, lora_A: tuple[torch.Tensor, ...]) -> Any:
    """x in the compute dtype, the Weight4bit, and x's dtype, in which bitsandbytes returns its result."""
    weight = four_bit_weight(base)
    if isinstance(weight, str):
        return weight
    dtype, compute = x.dtype, base._compute_dtype_for(x)
    if autocasts(x.device):
        branch = torch.get_autocast_dtype(x.device.type)
        if branch is not compute:
            return f"autocast computes the adapters in {branch}, the base layer computes in {compute}"
        return x, weight, dtype
    if compute is dtype:
        return x, weight, None
    for a in lora_A:
        if a.dtype is not compute:
            return f"x is {dtype} and an adapter {a.dtype}, but the base layer computes in {compute}"
    return x.to(compute), weight, dtype
