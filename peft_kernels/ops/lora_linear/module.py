"""LoRALinear: a frozen linear layer with LoRA adapters, its parameters named as in Hugging Face PEFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...checks import bad_type, bad_value, check_linear, check_probability
from ...weight4bit import Weight4bit
from ..linear_4bit.module import Linear4bit
from .op import lora_linear


class LoRALinear(nn.Module):
    """Y = base(x) + sum of the active adapters; see `peft_kernels.functional.lora_linear`.

    Parameters: `base_layer.*`, `lora_A.<adapter>.weight` (r, K), `lora_B.<adapter>.weight` (N, r), as PEFT names them.

    Args:
        base_layer: nn.Linear or Linear4bit; frozen.
        r, lora_alpha, lora_dropout, use_rslora, lora_bias, adapter_name: the first adapter, as in `add_adapter`.
    """

    lora_A: Any  # an nn.ModuleDict of nn.Linear: torch's annotations cannot say so
    lora_B: Any

    def __init__(
        self,
        base_layer: nn.Linear | Linear4bit,
        r: int,
        *,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        adapter_name: str = "default",
    ):
        super().__init__()
        check_linear("base_layer", base_layer, Linear4bit)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.add_adapter(
            adapter_name,
            r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
        )
        self.set_adapter(adapter_name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options: Any) -> LoRALinear:
        """Around an nn.Linear, whose parameters are shared and frozen."""
        return cls(linear, r, **options)

    @classmethod
    def from_bnb(cls, layer: nn.Module, r: int, **options: Any) -> LoRALinear:
        """Around a `bitsandbytes.nn.Linear4bit`, whose memory is shared."""
        return cls(Linear4bit.from_bnb(layer), r, **options)

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_layer.out_features

    def add_adapter(
        self,
        name: str,
        r: int,
        *,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """Add an adapter: A Kaiming-uniform and B zero, as in PEFT; scaling lora_alpha / r, or / sqrt(r) for rsLoRA."""
        if not isinstance(r, int):
            raise bad_type("r", "an int", r, "Typical ranks are 8 to 64.")
        if r < 1:
            raise bad_value("r", "a rank of at least 1", r, "Typical ranks are 8 to 64.")
        check_probability("lora_dropout", lora_dropout)
        if not name or "." in name:
            raise bad_value("name", "a name without dots", repr(name), "It becomes part of the parameters' names.")
        if name in self.lora_A:
            raise bad_value("name", "a new adapter name", repr(name), "Remove the old one or choose another name.")
        weight = self.base_layer.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
        options = {"device": weight.device, "dtype": dtype}
        self.lora_A[name] = nn.Linear(self.in_features, r, bias=False, **options)
        self.lora_B[name] = nn.Linear(r, self.out_features, bias=lora_bias, **options)
        nn.init.kaiming_uniform_(self.lora_A[name].weight, a=math.sqrt(5))
        for parameter in self.lora_B[name].parameters():
            nn.init.zeros_(parameter)
        self.scaling[name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout_p[name] = lora_dropout

    def set_adapter(self, names: str | list[str]) -> None:
        """Make these adapters, and no others, active."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.lora_A:
                raise bad_value("names", f"adapters of {list(self.lora_A)}", repr(name), "Add it with add_adapter.")
        self.active_adapters = names

    def merge(self) -> None:
        """Add the active adapters to the base weight (a 4-bit weight is decoded, changed and quantized again)."""
        names = [name for name in self.active_adapters if name not in self.merged_adapters]
        for name in names:
            if self.lora_B[name].bias is not None and self.base_layer.bias is None:
                raise bad_value("lora_bias", "a base layer with a bias", "none", f"Do not merge adapter {name!r}.")
        for name in names:
            self._add_to_base(name, 1.0)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again, up to the rounding of its dtype."""
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1.0)

    @torch.no_grad()
    def _add_to_base(self, name: str, sign: float) -> None:
        a, b = self.lora_A[name].weight, self.lora_B[name]
        delta = (b.weight.float() @ a.float()) * (sign * self.scaling[name])
        weight = self.base_layer.weight
        if isinstance(weight, Weight4bit):
            options: dict[str, Any] = {"quant_type": weight.quant_type, "blocksize": weight.blocksize}
            merged = (weight.dequantize(torch.float32) + delta).to(weight.dtype)
            self.base_layer.weight = Weight4bit.quantize(merged, double_quant=weight.nested is not None, **options)
        else:
            weight.copy_(weight.float() + delta)
        if b.bias is not None:
            bias = self.base_layer.bias
            assert bias is not None  # merge checks it
            bias.add_((b.bias * (sign * self.scaling[name])).to(bias.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        names = [name for name in self.active_adapters if name not in self.merged_adapters]
        if not names:
            return self.base_layer(x)
        return lora_linear(
            x,
            self.base_layer.weight,
            [self.lora_A[name].weight for name in names],
            [self.lora_B[name].weight for name in names],
            scaling=[self.scaling[name] for name in names],
            bias=self.base_layer.bias,
            lora_bias=[self.lora_B[name].bias for name in names],
            dropout_p=[self.dropout_p[name] for name in names],
            training=self.training,
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"active={self.active_adapters}, merged={self.merged_adapters}, scaling={self.scaling}"
