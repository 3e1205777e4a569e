"""prepare_bitfit and prepare_scale_bias: freeze a model but for what the method trains."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..checks import bad_type
from ..nn import Linear4bit
from ..weight4bit import Weight4bit
from .base_layer import overridden
from .filters import Filter, check_patterns, matches, parse_filters
from .replace import drop_own_forward, restore_layers
from .trained_layers import BitFitLinear, ScaleBias, ScaleBiasLinear, ScaleBiasLinear4bit

Filters = Filter | Iterable[Filter] | None

# The classes that take the place of a linear layer's: for BitFit, and for scale and bias. By name where they import
# bitsandbytes.
_BNB = ("trained_layers_bnb.BitFitLinear4bit", "trained_layers_bnb.ScaleBiasLinear4bit")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "torch.nn.modules.linear.Linear": (BitFitLinear, ScaleBiasLinear),
    "peft_kernels.ops.linear_4bit.module.Linear4bit": (Linear4bit, ScaleBiasLinear4bit),
    "bitsandbytes.nn.modules.Linear4bit": _BNB,
    "bitsandbytes.nn.modules.LinearNF4": _BNB,
    "bitsandbytes.nn.modules.LinearFP4": _BNB,
}
_CONV1D = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layer


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """What a model trains now. `print(report)` shows it in a few lines.

    trainable, total: numbers of parameters (a 4-bit weight counts as many as it stands for). trained: the names of the
    parameters that are trained. layers: the linear layers among their owners that `replace_layers` has a kernel for.
    left: (name, reason) for each linear layer that was selected and could not be prepared.
    """

    trainable: int
    total: int
    trained: tuple[str, ...]
    layers: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        head = f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.3f} %), "
        head += f"in {len(self.trained)} tensors; {len(self.layers)} linear layers were prepared"
        return "\n".join([head, *(f"  left alone: {name}: {reason}" for name, reason in self.left)])


def prepare_bitfit(
    model: nn.Module,
    *,
    include: Filters = None,
    exclude: Filters = None,
    add_missing: bool = False,
    also_train: Filters = None,
) -> PreparationReport:
    """Freeze `model`, in place, but for its biases (BitFit, arXiv:2106.10199).

    Linear layers (nn.Linear, bitsandbytes' Linear4bit, peft_kernels.nn.Linear4bit) get a class that `replace_layers`
    knows; their state dicts stay as they are. bitsandbytes would cast a float32 bias to the compute dtype at the first
    forward, in place, under the optimizer; these layers leave it alone.

    Args:
        include: whose biases are trained; default all. Filters as in `replace_layers`, on the module that owns the bias
            (the paper's smaller variant trains the biases of queries and of the MLP's first layer).
        exclude: the same, for biases that stay frozen; it prevails over `include`.
        add_missing: give linear layers without a bias one of zeros (float32 over a 4-bit weight).
        also_train: modules to train in full, such as a new classification head.

    Returns:
        PreparationReport: what is trained now, with the number of parameters.

    Raises:
        TypeError: model is no module, or a filter is neither a string nor callable.
        ValueError: a pattern of `include` matches nothing.
    """
    modules, selected, whole = _selection(model, include, exclude, also_train)
    layers, left = [], []
    for name, module in modules:
        linear, chosen = _classes_for(module) is not None, selected(name, module)
        if chosen and linear:
            reason = _swap(module, 0, add_bias=add_missing)
            if reason is None and module.bias is not None:
                layers.append(name)
            elif reason is not None:
                left.append((name, reason))
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if chosen and "bias" in parameter_name:
                parameter.requires_grad_(True)
    return _finish(model, modules, whole, layers, left)


def prepare_scale_bias(
    model: nn.Module,
    *,
    include: Filters = None,
    exclude: Filters = None,
    train_norms: bool = True,
    also_train: Filters = None,
) -> PreparationReport:
    """Freeze `model`, in place, but for a scale and a bias of every linear layer, and its norms.

    LLaMA-Adapter V2, arXiv:2304.15010, section 3.1: y = s * (W x + b). Linear layers (nn.Linear, bitsandbytes'
    Linear4bit, peft_kernels.nn.Linear4bit) get a parameter `scale` of ones, where they have none a `bias` of zeros,
    and a class that `replace_layers` knows; their other state-dict keys stay as they are. A scale is float32; a new
    bias has the dtype of a dense weight, and is float32 over a 4-bit one.

    Args:
        include: which linear layers; default all but the output embedding. Filters as in `replace_layers`.
        exclude: the same, for layers to leave frozen; it prevails over `include`.
        train_norms: train the parameters of normalization layers, as the paper does.
        also_train: modules to train in full.

    Returns, raises: as `prepare_bitfit`.
    """
    modules, selected, whole = _selection(model, include, exclude, also_train)
    head = getattr(model, "get_output_embeddings", lambda: None)() if include is None else None
    layers, left = [], []
    for name, module in modules:
        if isinstance(module, (nn.Linear, Linear4bit)) and module is not head and selected(name, module):
            reason = _swap(module, 1, add_bias=True)
            if reason is not None:
                left.append((name, reason))
                continue
            layers.append(name)
            for parameter in (module.scale, module.bias):
                parameter.requires_grad_(True)  # type: ignore[union-attr]
        elif _CONV1D in _names(module) and selected(name, module):
            left.append((name, "a Conv1D of transformers, whose weight is (in, out); only nn.Linear gets a scale"))
        if train_norms and "Norm" in type(module).__name__:
            module.requires_grad_(True)
    return _finish(model, modules, whole, layers, left)


def _selection(model: nn.Module, include: Filters, exclude: Filters, also_train: Filters) -> Any:
    """Freeze the model; its modules by name, whether one of them is meant, and which are trained in full."""
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", model, "Pass the model that holds the layers.")
    wanted, unwanted = parse_filters("include", include), parse_filters("exclude", exclude)
    whole = parse_filters("also_train", also_train)
    modules = list(model.named_modules())
    check_patterns("include", wanted, modules)
    check_patterns("also_train", whole, modules)
    restore_layers(model)  # a layer that is fused already would keep its old method
    model.requires_grad_(False)

    def selected(name: str, module: nn.Module) -> bool:
        return (include is None or matches(wanted, name, module)) and not matches(unwanted, name, module)

    return modules, selected, whole


def _classes_for(module: nn.Module) -> tuple[Any, Any] | None:
    """The prepared classes for a layer of exactly a known class, or prepared before; None for any other."""
    names = _names(module)
    prepared = type(module).__module__.startswith("peft_kernels.integrations.")
    return next((_CLASSES[name] for name in (names if prepared else names[:1]) if name in _CLASSES), None)


def _names(module: nn.Module) -> list[str]:
    """The qualified names of a module's class and its bases."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def _swap(module: Any, method: int, *, add_bias: bool) -> str | None:
    """Give a linear layer the class and the parameters of a method (0 BitFit, 1 scale and bias), or say why not."""
    classes, reason = _classes_for(module), overridden(module)
    if classes is None or reason is not None:
        return f"its {reason}" if reason else f"a subclass of Linear that is not known here ({type(module).__name__})"
    if method == 0 and isinstance(module, ScaleBias):
        return None  # its scale, frozen now, still belongs to what it computes
    cls = classes[method]
    if isinstance(cls, str):
        file, name = cls.split(".")
        cls = getattr(importlib.import_module(f"peft_kernels.integrations.{file}"), name)
    quantized = isinstance(module.weight, Weight4bit) or _is_packed(module.weight)
    n, dtype, device = module.out_features, torch.float32 if quantized else module.weight.dtype, module.weight.device
    if module.bias is None and add_bias:
        module.bias = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))
    if method == 1 and not hasattr(module, "scale"):
        wide = torch.promote_types(dtype, torch.float32)  # near 1, a step of bfloat16 is 0.8 %: training would be lost
        module.scale = nn.Parameter(torch.ones(n, dtype=wide, device=device))
    if module.bias is not None:
        drop_own_forward(module)
        module.__class__ = cls
    return None


def _finish(
    model: nn.Module,
    modules: list[tuple[str, nn.Module]],
    whole: list[Filter],
    layers: list[str],
    left: list[tuple[str, str]],
) -> PreparationReport:
    """Unfreeze what else is trained, and count."""
    for name, module in modules:
        if matches(whole, name, module):
            for parameter in module.parameters():
                parameter.requires_grad_(not _is_packed(parameter))
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(_numel(p) for p in model.parameters())
    for _, module in modules:
        weight: Any = getattr(module, "weight", None)  # no parameter, where it is a Weight4bit
        total += math.prod(weight.shape) if isinstance(weight, Weight4bit) else 0
    return PreparationReport(trainable, total, trained, tuple(layers), tuple(left))


def _is_packed(parameter: Any) -> bool:
    """Whether a parameter holds codes (bitsandbytes can store them as a floating dtype) or integers."""
    return getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point()


def _numel(parameter: Any) -> int:
    """Elements of a parameter; of a packed one, those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
