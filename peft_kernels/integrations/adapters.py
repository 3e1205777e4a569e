"""The `adapters` library's adapters on `bottleneck_adapter`; the methods but `forward` are the library's own."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from adapters.methods import modeling
from torch import nn
from transformers import activations

from .. import dispatch
from ..functional import bottleneck_adapter
from .base_layer import PLAIN, hooked, overridden
from .on_demand import OnDemand
from .replace import Undo

# What the library makes of `non_linearity` -> the kernel's name for it.
_ACTIVATIONS: dict[Any, str] = {
    nn.Identity: "identity",
    activations.LinearActivation: "identity",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
    nn.ReLU6: "relu6",
    nn.functional.leaky_relu: "leaky_relu",
    nn.LeakyReLU: "leaky_relu",
    activations.GELUActivation: "gelu",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.MishActivation: "mish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


class _Parts(NamedTuple):
    """What an adapter's forward reads, but for its scaling, gate, stochastic depth and last LayerNorm."""

    norm: nn.LayerNorm | None
    down: nn.Linear
    up: nn.Linear
    activation: str
    dropout: nn.Dropout


class FusedBottleneck:
    """`forward` for a bottleneck adapter: one kernel where there is one, the library's forward for all else."""

    _adds_residual: bool  # a parallel adapter leaves that, and stochastic depth, to others

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why no call of this layer can be served, or None. What one call lacks is found out by that call."""
        reason = overridden(layer)
        if reason is not None:
            return f"its {reason}"
        parts = _parts(layer)
        return parts if isinstance(parts, str) else None

    @staticmethod
    def _prepare(layer: Any) -> list[Undo]:
        return []

    @staticmethod
    def _probe(layer: Any) -> list:
        """The choice of the kernel for one row of zeros."""
        weight = next(layer.adapter_up.parameters())
        x = torch.zeros(1, 1, layer.input_size, dtype=weight.dtype, device=weight.device)
        return dispatch.probe(type(layer).forward, layer, x, x)

    def forward(self: Any, x: torch.Tensor, residual_input: torch.Tensor, output_gating: bool = False) -> tuple:
        """x (batch, ..., N) -> (output, hidden, what the up-projection adds[, gate]), the middle two on demand."""
        parts = _parts(self)
        reason = parts if isinstance(parts, str) else _why_not_call(self, parts, x, residual_input)
        if reason is not None:
            dispatch.note(f"{type(self).__bases__[-1].__qualname__}: left to the adapters library: {reason}")
            return super().forward(x, residual_input, output_gating)  # type: ignore[misc]
        kept = self._kept_paths(x)
        gate = torch.sigmoid(self.gate(x)).mean(dim=1).unsqueeze(-1) if self.use_gating else None
        output = self._output(parts, x, residual_input, [factor for factor in (kept, gate) if factor is not None])

        def up() -> torch.Tensor:
            product = self.adapter_up(self.adapter_down(x))
            return (product if kept is None else product * kept) * self.scaling

        results = (output, _later(lambda: self.adapter_down(x)), _later(up))
        return (*results, gate) if gate is not None and output_gating else results

    def _kept_paths(self: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Stochastic depth's factors (batch, 1, ...), as its module draws them; None where it keeps all."""
        module = self._modules.get("DropPath") if self._adds_residual else None
        if module is None or not module.training or dispatch.recording():
            return None
        return module(torch.ones(x.shape[0], *(1 for _ in x.shape[1:]), dtype=_compute_dtype(x), device=x.device))

    def _output(self: Any, parts: _Parts, x: torch.Tensor, residual: torch.Tensor, factors: list) -> torch.Tensor:
        """What the library calls output, in its dtype; the kernel adds the residual where nothing comes before that."""
        norm, dtype = self._modules.get("adapter_norm_after"), _compute_dtype(x)
        scaling = self.scaling if isinstance(self.scaling, torch.Tensor) else None
        promotes = scaling is not None and torch.promote_types(dtype, scaling.dtype) is not dtype  # by autocast
        before = self._adds_residual and (norm is None or self.adapter_residual_before_ln)
        inside = before and not promotes and residual.shape == x.shape
        y = bottleneck_adapter(
            x,
            parts.down.weight,
            parts.down.bias,
            parts.up.weight,
            parts.up.bias,
            activation=parts.activation,
            scaling=factors if promotes else [self.scaling, *factors],
            residual=residual if inside else None,
            ln_weight=None if parts.norm is None else parts.norm.weight,
            ln_bias=None if parts.norm is None else parts.norm.bias,
            ln_eps=1e-5 if parts.norm is None else parts.norm.eps,
            dropout_p=parts.dropout.p,
            training=parts.dropout.training,
        )
        if promotes:
            y = y * self.scaling
        if before and not inside:
            y = y + residual
        y = y if norm is None else norm(y)
        return y + residual if self._adds_residual and not before else y


class FusedAdapter(FusedBottleneck, modeling.Adapter):
    """`adapters.methods.modeling.Adapter`, the sequential bottleneck adapter."""

    _adds_residual = True


class FusedParallelAdapter(FusedBottleneck, modeling.ParallelAdapter):
    """`adapters.methods.modeling.ParallelAdapter`."""

    _adds_residual = False


def _later(compute: Any) -> torch.Tensor:
    """compute() when it is used; a compiler drops by itself what nobody uses."""
    return compute() if torch.compiler.is_compiling() else OnDemand.of(compute)


def _parts(layer: Any) -> _Parts | str:
    """The modules that the kernel takes the place of, or why they have none."""
    modules = layer._modules
    norm, up, dropout = modules.get("adapter_norm_before"), modules["adapter_up"], modules["dropout"]
    *first, down, nonlinearity = modules["adapter_down"]._modules.values()
    if type(down) is modeling.PHMLayer:
        return "its projections are Kronecker products (PHMLayer), which the kernel does not form"
    expected = [] if norm is None else [norm]
    if first != expected or nonlinearity is not layer.non_linearity:
        return "its modules are not those that the library makes"
    if type(down) is not nn.Linear or type(up) is not nn.Linear or type(dropout) is not nn.Dropout:
        kinds = ", ".join(type(module).__name__ for module in (down, up, dropout))
        return f"it is made of {kinds}, not of Linear, Linear, Dropout"
    if norm is not None and type(norm) is not nn.LayerNorm:
        return f"its LayerNorm is a {type(norm).__name__}"
    bypassed = [modules["adapter_down"], *first, down, nonlinearity, *nonlinearity.children(), up, dropout]
    if any(hooked(module) for module in bypassed):
        return "one of its modules has hooks"
    for module in (*first, down, up):
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in PLAIN:
                return f"a parameter is a {type(parameter).__name__}, which is gathered by its module's forward"
    activation = _activation(nonlinearity.f)
    if activation is None:
        return f"there is no kernel for its activation {getattr(nonlinearity.f, '__name__', nonlinearity.f)}"
    return _Parts(norm, down, up, activation, dropout)


def _activation(f: Any) -> str | None:
    """The kernel's name for what an Activation_Function_Class calls, or None."""
    if type(f) is nn.LeakyReLU and f.negative_slope != 0.01:
        return None
    return _ACTIVATIONS.get(f if isinstance(f, types.FunctionType) else type(f))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _why_not_call(layer: Any, parts: _Parts, x: Any, residual: Any) -> str | None:
    """Why this call is left to the library (its errors too are the library's), or None."""
    if type(x) not in PLAIN or not x.is_floating_point():
        return f"x is a {type(x).__name__} of {getattr(x, 'dtype', 'no dtype')}"
    if layer._adds_residual and type(residual) not in PLAIN:
        return f"residual_input is a {type(residual).__name__}"
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype is torch.float64:
            return "autocast leaves float64 as it is"
    else:
        for module in filter(None, (parts.norm, parts.down, parts.up)):
            if module.weight.dtype is not x.dtype:
                return f"x is {x.dtype}, a weight {module.weight.dtype}"
    if layer.use_gating and x.dim() != 3:
        return f"the gate's mean over the sequence needs x of 3 dimensions, not {x.dim()}"
    return None
