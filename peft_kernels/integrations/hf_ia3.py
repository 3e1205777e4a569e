"""Hugging Face PEFT's IA³ layers on `ia3_linear`; the methods but `forward` are PEFT's own."""

from __future__ import annotations

import contextlib
from typing import Any

import peft.tuners.ia3.layer as ia3
import torch
from torch import nn

from .. import dispatch
from ..checks import autocasts
from ..functional import ia3_linear
from ..ops.scaled_linear.vendor import why_vendor
from .base_layer import PLAIN, dense_base, four_bit_weight
from .hf_peft import FusedAdapter, besides, why_not_now


class FusedIA3(FusedAdapter):
    """`forward` for a PEFT IA³ layer: one kernel where there is one, PEFT's forward for all else."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N), with the casts and the adapters that PEFT's forward would use."""
        if dispatch.undirected() and _is_small(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        call = _gather(self, x) if not (args or kwargs) else besides(kwargs)
        if isinstance(call, str):
            self._left_to_peft(call)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        x, weight, scales, no_autocast, out_dtype = call
        bias = self._modules["base_layer"]._parameters["bias"]
        with torch.autocast(x.device.type, enabled=False) if no_autocast else contextlib.nullcontext():
            y = ia3_linear(x, weight, scales, bias=bias, is_feedforward=self.is_feedforward)
        return y if out_dtype is None else y.to(out_dtype)

    def _four_bit_dtypes(self, x: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """What PEFT hands to a 4-bit base layer, and what it returns: here both are x's dtype."""
        return x.dtype, x.dtype


class FusedLinear(FusedIA3, ia3.Linear):
    """`peft.tuners.ia3.Linear` over nn.Linear, or over a 4-bit layer that the model does not declare."""


def _is_small(layer: Any, x: torch.Tensor) -> bool:
    """Whether `ia3_linear` would do what PEFT's forward does anyway, with torch's operations."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear:
        return False
    vectors = layer._modules["ia3_l"]
    return why_vendor(x, base.weight, base._parameters["bias"], vectors, layer.is_feedforward) is not None


def _gather(layer: Any, x: torch.Tensor) -> Any:
    """x, weight, vectors, whether autocast must stand aside, and the dtype to cast the result to; or why not."""
    reason = why_not_now(layer, x)
    if reason is not None:
        return reason
    vectors = layer._modules["ia3_l"]
    scales = [vectors[name] for name in layer.active_adapters if name in vectors]
    if not scales:
        return "it has none of the active adapters"
    dtype = scales[0].dtype
    for scale in scales:
        if type(scale) not in PLAIN or scale.dtype is not dtype:
            return f"an active adapter is a {type(scale).__name__} of {scale.dtype}, the first is of {dtype}"
    if layer.is_feedforward and torch.promote_types(x.dtype, dtype) is not dtype:
        return f"x is {x.dtype}, and PEFT rounds it to the adapter's {dtype}"
    base = layer._modules["base_layer"]
    if type(base) is nn.Linear:
        served = dense_base(base, x)
        return served if isinstance(served, str) else (x, served[1], scales, False, None)
    weight = four_bit_weight(base)
    if isinstance(weight, str):
        return weight
    given, returned = layer._four_bit_dtypes(x, dtype)
    compute = base._compute_dtype_for(torch.empty(0, dtype=given, device=x.device))
    out_dtype = None if returned is compute else returned
    return x.to(compute), weight, scales, autocasts(x.device), out_dtype
