"""Linear layers that train their bias, or a scale and their bias: what prepare_bitfit and prepare_scale_bias make.

Each comes as a plain layer, which needs no kernel, and as the fused one that replace_layers puts in its place. They are
subclasses of the layers they stand for, with the same state dict (and `scale`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import dispatch
from ..functional import bitfit_linear, scale_bias_linear
from ..nn import Linear4bit
from ..ops.scaled_linear.vendor import why_vendor
from ..weight4bit import Weight4bit
from .base_layer import dense_base, overridden
from .replace import Undo


class BitFitLinear(nn.Linear):
    """An nn.Linear of which the bias is trained."""


class ScaleBias:
    """`forward` of a linear layer with a learned scale of its output (N,): a * (x W^T + b)."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        y = super().forward(x)  # type: ignore[misc]
        return (y * self.scale).to(y.dtype)


class ScaleBiasLinear(ScaleBias, nn.Linear):
    """An nn.Linear with a learned scale and a learned bias."""


class ScaleBiasLinear4bit(ScaleBias, Linear4bit):
    """A `peft_kernels.nn.Linear4bit` with a learned scale and a learned bias."""


class FusedTrained:
    """`forward` on one kernel where there is one, the plain layer's for all else."""

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why no call of this layer can be served, or None."""
        reason = overridden(layer)
        return None if reason is None else f"its {reason}"

    @staticmethod
    def _prepare(layer: Any) -> list[Undo]:
        return []

    @property
    def _input_dtype(self: Any) -> torch.dtype:
        return self.weight.dtype

    def _linear(self: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        return scale_bias_linear(x, weight, self._parameters["scale"], bias)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        parameters = self._parameters  # by attribute each would cost a failed look-up first
        weight = parameters.get("weight")
        weight = self.weight if weight is None else weight
        if dispatch.undirected() and why_vendor(x, weight, parameters["bias"], parameters.get("scale"), False):
            return super().forward(x)  # type: ignore[misc]
        served = (x, weight, None) if isinstance(weight, Weight4bit) else dense_base(self, x)
        if isinstance(served, str):
            dispatch.note(f"{type(self).__name__}: left to the plain layer: {served}")
            return super().forward(x)  # type: ignore[misc]
        return self._linear(x, weight, parameters["bias"])


class FusedBitFitLinear(FusedTrained, BitFitLinear):
    """`BitFitLinear`."""

    def _linear(self: Any, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        return bitfit_linear(x, weight, bias)


class FusedScaleBiasLinear(FusedTrained, ScaleBiasLinear):
    """`ScaleBiasLinear`."""


class FusedScaleBiasLinear4bit(FusedTrained, ScaleBiasLinear4bit):
    """`ScaleBiasLinear4bit`."""
