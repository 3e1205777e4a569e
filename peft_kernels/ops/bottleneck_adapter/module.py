"""BottleneckAdapter: the adapters of Houlsby, Pfeiffer, He (parallel, scaled) and Adapter+ as one module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...checks import bad_type, bad_value, check_probability, check_tensor
from .activations import canonical
from .op import bottleneck_adapter
from .scaling import Factor


def _bert(weight: torch.Tensor) -> None:
    nn.init.normal_(weight, std=0.02)


def _near_identity(weight: torch.Tensor) -> None:
    nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)


def _kaiming(weight: torch.Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


# name -> how the down-, up- and gate weights start; every bias starts at zero
_INITS: dict[str, tuple[Callable[[torch.Tensor], Any], ...]] = {
    "bert": (_bert, _bert, _bert),
    "houlsby": (_near_identity, _near_identity, _kaiming),
    "mam_adapter": (_kaiming, nn.init.zeros_, _bert),
}


def _weight_and_bias(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As attributes only where they are no plain parameters (parametrized, pruned)."""
    own = layer._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (layer.weight, layer.bias)


class BottleneckAdapter(nn.Module):
    """Y = [norm_after] (residual + drop(s * up(act(down([norm_before](x)))))); see `functional.bottleneck_adapter`.

    Parameters: `down.weight` (r, K), `down.bias` (r,), `up.weight` (K, r), `up.bias` (K,); where asked for, `scaling`
    (1,) or (K,), `norm_before.*` and `norm_after.*` (K,), `gate.weight` (1, K) and `gate.bias` (1,).

    Args:
        hidden_size: K. bottleneck_size: r.
        activation: see `functional.bottleneck_adapter`.
        scaling: a float, "learned" (one trained scalar) or "channel" (a trained factor per channel).
        residual: True for a sequential adapter, which adds its input; False for a parallel one, which returns its
            change alone unless a residual is passed.
        norm_before, norm_after: layer norms of the adapter's input and output.
        residual_before_norm: whether norm_after sees the residual, or the residual is added after it.
        use_gating: multiply by the mean over the sequence (dimension 1) of sigmoid(gate(x)), as UniPELT does.
        dropout: probability of zeroing an element of the scaled up-projection.
        stochastic_depth: probability of skipping the adapter for a whole sample (dimension 0) in training.
        init_weights: "bert" (normal, 0.02), "houlsby" (truncated normal, 0.01: near the identity) or "mam_adapter"
            (Kaiming-uniform down, zero up: exactly the identity).

    Source: Houlsby et al., arXiv:1902.00751; Pfeiffer et al., arXiv:2005.00247; He et al., arXiv:2110.04366; UniPELT,
    arXiv:2110.07577; Adapter+, arXiv:2406.06820. Options and starts as in the `adapters` library.
    """

    scaling: Any  # a float or an nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str = "relu",
        scaling: float | str = 1.0,
        residual: bool = True,
        norm_before: bool = False,
        norm_after: bool = False,
        residual_before_norm: bool = True,
        use_gating: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        init_weights: str = "bert",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size < 1 or bottleneck_size < 1:
            sizes = f"{hidden_size} and {bottleneck_size}"
            raise bad_value("hidden_size, bottleneck_size", "at least 1", sizes, "Check the adapter's configuration.")
        if init_weights not in _INITS:
            raise bad_value("init_weights", f"one of {list(_INITS)}", repr(init_weights), "Choose one of them.")
        if isinstance(scaling, str) and scaling not in ("learned", "channel"):
            raise bad_value("scaling", "a float, 'learned' or 'channel'", repr(scaling), "Choose one of them.")
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float, str)):
            raise bad_type("scaling", "a float, 'learned' or 'channel'", scaling, "Choose one of them.")
        check_probability("dropout", dropout)
        check_probability("stochastic_depth", stochastic_depth)
        self.activation, self.residual, self.residual_before_norm = (
            canonical(activation),
            residual,
            residual_before_norm,
        )
        self.dropout_p, self.stochastic_depth, self.init_weights = dropout, stochastic_depth, init_weights
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(hidden_size, bottleneck_size, bias=bias, **options)
        self.up = nn.Linear(bottleneck_size, hidden_size, bias=bias, **options)
        self.norm_before = nn.LayerNorm(hidden_size, **options) if norm_before else None
        self.norm_after = nn.LayerNorm(hidden_size, **options) if norm_after else None
        self.gate = nn.Linear(hidden_size, 1, **options) if use_gating else None
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else hidden_size, **options))
        else:
            self.scaling = scaling
        self.reset_parameters()

    @classmethod
    def houlsby(cls, hidden_size: int, bottleneck_size: int, **options: Any) -> BottleneckAdapter:
        """Sequential, twice per block, swish in the `adapters` library, near the identity at the start."""
        return cls(hidden_size, bottleneck_size, **{"activation": "swish", "init_weights": "houlsby"} | options)

    @classmethod
    def pfeiffer(cls, hidden_size: int, bottleneck_size: int, **options: Any) -> BottleneckAdapter:
        """Sequential, once per block, relu."""
        return cls(hidden_size, bottleneck_size, **options)

    @classmethod
    def parallel(
        cls, hidden_size: int, bottleneck_size: int, scaling: float | str = 4.0, **options: Any
    ) -> BottleneckAdapter:
        """Beside a sub-layer and scaled, relu: its output is added to the sub-layer's, which `forward` may be given."""
        defaults: dict[str, Any] = {"residual": False, "init_weights": "mam_adapter"}
        return cls(hidden_size, bottleneck_size, scaling=scaling, **defaults | options)

    @property
    def in_features(self) -> int:
        """K."""
        return self.down.in_features

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as `init_weights` says."""
        for layer, start in zip((self.down, self.up, self.gate), _INITS[self.init_weights], strict=True):
            if layer is not None:
                start(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., K) -> (..., K); residual (..., K) takes the place of x in a sequential adapter's sum."""
        if residual is None and self.residual:
            residual = x
        layers: dict[str, Any] = self._modules  # nn.Module's own look-up of a layer or a parameter is slow
        down_weight, down_bias = _weight_and_bias(layers["down"])
        up_weight, up_bias = _weight_and_bias(layers["up"])
        norm, after = layers.get("norm_before"), layers.get("norm_after")
        ln_weight, ln_bias = (None, None) if norm is None else _weight_and_bias(norm)
        inside = after is None or self.residual_before_norm
        y = bottleneck_adapter(
            x,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            activation=self.activation,
            scaling=self._factors(x),
            residual=residual if inside else None,
            ln_weight=ln_weight,
            ln_bias=ln_bias,
            ln_eps=1e-5 if norm is None else norm.eps,
            dropout_p=self.dropout_p,
            training=self.training,
        )
        y = y if after is None else after(y)
        return y if inside or residual is None else y + residual

    def _factors(self, x: torch.Tensor) -> Factor | list[Factor]:
        """Scaling, gate and stochastic depth, to be multiplied."""
        gate: Any = self._modules.get("gate")
        if gate is None and self.stochastic_depth == 0:
            return self.scaling
        factors: list[Factor] = [self.scaling]
        if gate is not None:
            check_tensor("x", x, 3)
            factors.append(torch.sigmoid(gate(x)).mean(dim=1, keepdim=True))
        if self.training and self.stochastic_depth > 0:
            keep = 1 - self.stochastic_depth
            samples = torch.empty((x.shape[0], *(1 for _ in x.shape[1:])), dtype=x.dtype, device=x.device)
            factors.append(samples.bernoulli_(keep) / (keep if keep > 0 else 1))
        return factors

    def extra_repr(self) -> str:
        """What print(module) shows."""
        scaling = self.scaling if isinstance(self.scaling, (float, int)) else f"trained {tuple(self.scaling.shape)}"
        return f"activation={self.activation}, scaling={scaling}, residual={self.residual}, dropout={self.dropout_p}"
