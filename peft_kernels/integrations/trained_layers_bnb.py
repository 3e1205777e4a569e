"""The layers of `trained_layers` over bitsandbytes' Linear4bit; apart, because they import bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

from ..functional import bitfit_linear, scale_bias_linear
from ..weight4bit import Weight4bit
from .bitsandbytes import FusedForward
from .trained_layers import ScaleBias


class BitFitLinear4bit(bnb.nn.Linear4bit):
    """A Linear4bit of which the bias is trained, in its own dtype: bitsandbytes' forward would cast it in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) of x's dtype."""
        bias = self._parameters["bias"]
        if bias is None:
            return super().forward(x)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        y = bnb.nn.Linear4bit.forward(_without_bias(self), x)
        return (y + bias).to(y.dtype)


def _without_bias(layer: bnb.nn.Linear4bit) -> bnb.nn.Linear4bit:
    """The same layer but for its bias: other threads may be using the layer itself."""
    other = object.__new__(bnb.nn.Linear4bit)
    other.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters, "bias": None}}
    return other


class ScaleBiasLinear4bit(ScaleBias, BitFitLinear4bit):
    """A Linear4bit with a learned scale and a learned bias."""


class FusedBitFitLinear4bit(FusedForward, BitFitLinear4bit):
    """`BitFitLinear4bit`."""

    def _linear(self: Any, x: torch.Tensor, weight: Weight4bit, bias: Any) -> torch.Tensor:
        return bitfit_linear(x, weight, bias)


class FusedScaleBiasLinear4bit(FusedForward, ScaleBiasLinear4bit):
    """`ScaleBiasLinear4bit`."""

    def _linear(self: Any, x: torch.Tensor, weight: Weight4bit, bias: Any) -> torch.Tensor:
        return scale_bias_linear(x, weight, self.scale, bias)


# PEFT and transformers compare the class's name with "Linear4bit"; pickle uses the qualified name, which stays.
for _cls in (BitFitLinear4bit, ScaleBiasLinear4bit, FusedBitFitLinear4bit, FusedScaleBiasLinear4bit):
    _cls.__name__ = "Linear4bit"
