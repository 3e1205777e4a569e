"""IA3Linear, BitFitLinear, ScaleBiasLinear: a frozen linear layer, and what the method trains of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...checks import bad_value, check_bnb, check_linear, check_shape, check_tensor
from ...weight4bit import Weight4bit
from ..linear_4bit.module import FrozenWeight, Linear4bit
from .op import bitfit_linear, ia3_linear, scale_bias_linear


class IA3Linear(nn.Module):
    """A linear layer whose output, or input, IA³ adapters scale; see `peft_kernels.functional.ia3_linear`.

    Parameters, as PEFT names them: `base_layer.*`, `ia3_l.<adapter>` (N, 1), for a feed-forward layer (1, K).

    Args:
        base_layer: nn.Linear or Linear4bit; frozen.
        is_feedforward: scale the input. adapter_name: the first adapter; it starts as ones, which change nothing.
    """

    ia3_l: Any  # an nn.ParameterDict: torch's annotations cannot say of what

    def __init__(
        self, base_layer: nn.Linear | Linear4bit, *, is_feedforward: bool = False, adapter_name: str = "default"
    ):
        super().__init__()
        check_linear("base_layer", base_layer, Linear4bit)
        self.base_layer = base_layer.requires_grad_(False)
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self._before_merge: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.add_adapter(adapter_name)
        self.set_adapter(adapter_name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> IA3Linear:
        """Around an nn.Linear, whose parameters are shared and frozen."""
        return cls(linear, **options)

    @classmethod
    def from_bnb(cls, layer: nn.Module, **options: Any) -> IA3Linear:
        """Around a `bitsandbytes.nn.Linear4bit`, whose memory is shared."""
        return cls(Linear4bit.from_bnb(layer), **options)

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_layer.out_features

    def add_adapter(self, name: str) -> None:
        """Add an adapter of ones."""
        if name in self.ia3_l:
            raise bad_value("name", "a new adapter name", repr(name), "Remove the old one or choose another name.")
        weight = self.base_layer.weight
        shape = (1, self.in_features) if self.is_feedforward else (self.out_features, 1)
        self.ia3_l[name] = nn.Parameter(torch.ones(shape, dtype=weight.dtype, device=weight.device))

    def set_adapter(self, names: str | list[str]) -> None:
        """Make these adapters, and no others, active; several multiply."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.ia3_l:
                raise bad_value("names", f"adapters of {list(self.ia3_l)}", repr(name), "Add it with add_adapter.")
        self.active_adapters = names

    @torch.no_grad()
    def merge(self) -> None:
        """Scale a dense base weight by the active adapters. A copy is kept, so that `unmerge` is exact at l = 0 too."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if isinstance(weight, Weight4bit):
            raise bad_value("base_layer", "a dense weight to merge into", weight, "Leave the adapter unmerged.")
        names = [name for name in self.active_adapters if name not in self.merged_adapters]
        if names and self._before_merge is None:
            self._before_merge = weight.clone(), None if bias is None else bias.clone()
        for name in names:
            scale = self.ia3_l[name]
            weight.mul_(scale)
            if bias is not None and not self.is_feedforward:
                bias.mul_(scale.view(-1))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base layer back what it held before `merge`."""
        if self._before_merge is None:
            return
        weight, bias = self._before_merge
        self.base_layer.weight.copy_(weight)
        if bias is not None and self.base_layer.bias is not None:
            self.base_layer.bias.copy_(bias)
        self._before_merge, self.merged_adapters = None, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        scales = [self.ia3_l[name] for name in self.active_adapters if name not in self.merged_adapters]
        if not scales:
            return self.base_layer(x)
        base = self.base_layer
        return ia3_linear(x, base.weight, scales, bias=base.bias, is_feedforward=self.is_feedforward)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"active={self.active_adapters}, merged={self.merged_adapters}, is_feedforward={self.is_feedforward}"


class BitFitLinear(FrozenWeight):
    """Y = x W^T + b, of which b alone is trained; see `peft_kernels.functional.bitfit_linear`.

    Its state dict is that of the layer it was made from.

    Args:
        weight: (N, K) or a Weight4bit; frozen. bias: (N,); default zeros of the weight's dtype.
    """

    def __init__(self, weight: torch.Tensor | Weight4bit, bias: torch.Tensor | None = None):
        super().__init__(weight)
        if isinstance(weight, torch.Tensor):
            check_tensor("weight", weight, 2)
        if bias is None:
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        check_tensor("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
        self.bias = nn.Parameter(bias.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Any:
        """Share the parameters of an nn.Linear."""
        check_linear("linear", linear)
        return cls(linear.weight.detach(), linear.bias)

    @classmethod
    def from_bnb(cls, layer: Any) -> Any:
        """Share the parameters of a `bitsandbytes.nn.Linear4bit`."""
        check_bnb("layer", layer)
        return cls(Weight4bit.from_bnb(layer.weight), layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        return bitfit_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ScaleBiasLinear(BitFitLinear):
    """Y = a * (x W^T + b), of which a and b are trained; see `peft_kernels.functional.scale_bias_linear`.

    Its state dict is that of the layer it was made from, and `scale`; `scale` starts as ones, which change nothing.

    Args:
        weight: (N, K) or a Weight4bit; frozen. bias: (N,); default zeros of the weight's dtype.
    """

    def __init__(self, weight: torch.Tensor | Weight4bit, bias: torch.Tensor | None = None):
        super().__init__(weight, bias)
        self.scale = nn.Parameter(torch.ones_like(self.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        return scale_bias_linear(x, self.weight, self.scale, self.bias)
