"""replace_layers and restore_layers: swap a layer's class for a fused subclass of that very class, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import dispatch
from ..checks import bad_type
from .filters import Filter, check_patterns, matches, parse_filters
from .report import Entry, ReplacementReport

# A class by its qualified name -> the module here and the class in it that takes its place. A fused class is a subclass
# of the one it replaces; it has `why_not(module)`, which says why that layer cannot be served, or None if it can, and
# `_prepare(module)`, which readies the layer and returns how to undo that; it may have `_release(module)`, which undoes
# that on restore_layers, and `_probe(module)`, which records the choice of its kernel and changes nothing. By name, so
# that nothing is imported that the model does not already use.
REGISTRY: dict[str, tuple[str, str]] = {
    "peft.tuners.lora.layer.Linear": ("hf_peft", "FusedLinear"),
    "peft.tuners.lora.bnb.Linear4bit": ("hf_peft_4bit", "FusedLinear4bit"),
    "peft.tuners.ia3.layer.Linear": ("hf_ia3", "FusedLinear"),
    "peft.tuners.ia3.bnb.Linear4bit": ("hf_ia3_4bit", "FusedLinear4bit"),
    "peft_kernels.integrations.trained_layers.BitFitLinear": ("trained_layers", "FusedBitFitLinear"),
    "peft_kernels.integrations.trained_layers.ScaleBiasLinear": ("trained_layers", "FusedScaleBiasLinear"),
    "peft_kernels.integrations.trained_layers.ScaleBiasLinear4bit": ("trained_layers", "FusedScaleBiasLinear4bit"),
    "peft_kernels.integrations.trained_layers_bnb.BitFitLinear4bit": ("trained_layers_bnb", "FusedBitFitLinear4bit"),
    "peft_kernels.integrations.trained_layers_bnb.ScaleBiasLinear4bit": (
        "trained_layers_bnb",
        "FusedScaleBiasLinear4bit",
    ),
    "bitsandbytes.nn.modules.Linear4bit": ("bitsandbytes", "FusedLinear4bit"),
    "bitsandbytes.nn.modules.LinearNF4": ("bitsandbytes", "FusedLinearNF4"),
    "bitsandbytes.nn.modules.LinearFP4": ("bitsandbytes", "FusedLinearFP4"),
    "peft.peft_model.PeftModelForCausalLM": ("hf_prompt", "FusedPeftModelForCausalLM"),
    "peft.peft_model.PeftModelForSequenceClassification": ("hf_prompt", "FusedPeftModelForSequenceClassification"),
    "peft.peft_model.PeftModelForTokenClassification": ("hf_prompt", "FusedPeftModelForTokenClassification"),
    "peft.tuners.adaption_prompt.layer.AdaptedAttention": ("hf_adaption_prompt", "FusedAdaptedAttention"),
    "peft.tuners.adaption_prompt.layer.AdaptedAttentionGPT": ("hf_adaption_prompt", "FusedAdaptedAttentionGPT"),
    "adapters.methods.modeling.Adapter": ("adapters", "FusedAdapter"),
    "adapters.methods.modeling.ParallelAdapter": ("adapters", "FusedParallelAdapter"),
}

# The fused 4-bit layers, exactly (not subclasses of them): what an adapter layer may read the weight of. A
# list, since torch 2.6's compiler looks up no class in a set.
FOUR_BIT: list[type] = []

Undo = Callable[[], None]


def replace_layers(
    model: nn.Module,
    *,
    include: Filter | Iterable[Filter] | None = None,
    exclude: Filter | Iterable[Filter] | None = None,
    strict: bool = False,
) -> ReplacementReport:
    """Make every layer of `model` that has a kernel use it, in place, by swapping its class for a fused subclass.

    Served are Hugging Face PEFT's LoRA and IA³ layers over nn.Linear and over bitsandbytes' Linear4bit, bitsandbytes'
    Linear4bit itself, the layers of prepare_bitfit and prepare_scale_bias, PEFT models with prefix-tuning, P-tuning or
    prompt tuning, PEFT's LLaMA-Adapter layers, and the bottleneck adapters of the `adapters` library. A model with a
    prefix or with LLaMA-Adapter also gets `peft_kernels` as its attention function in place of `sdpa`. Parameters,
    state-dict keys, hooks and every method but `forward` (for a prefix `get_prompt`) stay as they are; a call that has
    no kernel (DoRA, adapter_names, hooks on inner modules) goes to the old forward, and `peft_kernels.explain` says
    why. Calling it again, for instance after adding adapters to further layers, replaces only what is new.

    Args:
        model: any module, a single layer too.
        include: which layers to replace; default all. A pattern for the dotted name or a tail of it (`fnmatch`:
            "q_proj", "layers.0.*", "*.mlp.*"), a callable (name, module) -> bool, or an iterable of these, any of which
            may match. A 4-bit base layer inside an adapter layer follows that layer.
        exclude: the same, for layers to leave alone; it prevails over `include`.
        strict: raise if any layer that was not excluded must be left alone.

    Returns:
        ReplacementReport: one entry for each layer looked at; print it for a table.

    Raises:
        TypeError: model is no module, or a filter is neither a string nor callable.
        ValueError: an `include` pattern matches no layer.
        RuntimeError: strict and a layer must be left alone, or a layer's check failed. The error names the layer, and
            the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", model, "Pass the model that holds the layers.")
    candidates = list(_candidates(model))
    include_filters, exclude_filters = parse_filters("include", include), parse_filters("exclude", exclude)
    owners = [(name, module) for name, module, adapter in candidates if adapter is None]
    check_patterns("include", include_filters, owners)
    plan = []
    for name, module, adapter in candidates:
        owner = adapter or (name, module)
        wanted = (include is None or matches(include_filters, *owner)) and not matches(exclude_filters, *owner)
        reason = _checked(name, module, lambda m: _fused_class(m).why_not(m)) if wanted else "excluded by the caller"
        plan.append((name, module, adapter, reason, wanted))
    refused = [(name, module, reason) for name, module, _, reason, wanted in plan if wanted and reason]
    if strict and refused:
        lines = "\n".join(f"  {name} ({_qualified(type(module))}): {reason}" for name, module, reason in refused)
        raise RuntimeError(f"strict: {len(refused)} layers must be left alone; nothing was changed.\n{lines}")
    return ReplacementReport(tuple(_carry_out(plan)))


def restore_layers(model: nn.Module) -> None:
    """Undo replace_layers: every fused layer of `model` gets its old class back.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", model, "Pass the model that holds the layers.")
    for module in model.modules():
        if _is_fused(type(module)):
            _restore(module)


def _restore(module: nn.Module) -> None:
    release = getattr(type(module), "_release", None)
    if release is not None:
        release(module)
    module.__dict__.pop("_weight_view", None)
    drop_own_forward(module)
    module.__class__ = type(module).__bases__[-1]


def own_forward(module: nn.Module) -> bool:
    """Whether the instance's `forward` is but its class's method, as PEFT's disable_adapter leaves it behind."""
    forward = module.__dict__.get("forward")
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def drop_own_forward(module: nn.Module) -> None:
    """Before the class changes: such an attribute would go on calling the old class's method."""
    if own_forward(module):
        del module.__dict__["forward"]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, nn.Module] | None]]:
    """The layers to look at: name, module, and for a base layer the adapter layer around it (name, module)."""
    adapter_of: dict[nn.Module, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        kinds = [_qualified(cls) for cls in type(module).__mro__]
        if "peft.tuners.tuners_utils.BaseTunerLayer" in kinds:
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Module):
                adapter_of[base] = (name, module)
        elif "peft.peft_model.PeftModel" in kinds:
            if not module._is_prompt_learning:  # the adapters are in its layers
                continue
        elif not any(kind in REGISTRY for kind in kinds):
            continue
        yield name, module, adapter_of.get(module)


def _fused_class(module: nn.Module) -> Any:
    """The fused class for a module of exactly a registered class, or of a fused one; else one that says why not."""
    if _is_fused(type(module)):
        return type(module)
    entry = REGISTRY.get(_qualified(type(module)))
    if entry is None:
        return _NoKernel
    return getattr(importlib.import_module(f"peft_kernels.integrations.{entry[0]}"), entry[1])


class _NoKernel:
    @staticmethod
    def why_not(module: nn.Module) -> str:
        known = next((c for c in type(module).__mro__[1:] if _qualified(c) in REGISTRY), None)
        if known is not None:
            return f"a subclass of {_qualified(known)} that is not known here may compute something else"
        return "there is no kernel for this class"


def why_base_not(base: nn.Module) -> str | None:
    """Why an adapter layer's base layer cannot be served, or None if it can."""
    fused = _fused_class(base)
    if fused not in FOUR_BIT:
        return f"its base layer is of class {_qualified(type(base))}, which has no kernel"
    return fused.why_not(base)


def _is_fused(cls: type) -> bool:
    return cls.__module__.startswith("peft_kernels.integrations.") and hasattr(cls, "why_not")


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _checked(name: str, module: nn.Module, step: Callable[[nn.Module], Any]) -> Any:
    """step(module), its failure told with the layer's name."""
    try:
        return step(module)
    except Exception as error:
        raise RuntimeError(
            f"replace_layers: layer {name!r} ({_qualified(type(module))}) failed with {type(error).__name__}: {error}. "
            f"Nothing was changed; leave it out with exclude={name!r}."
        ) from error


def _carry_out(plan: list) -> list[Entry]:
    """Swap all classes that the plan says, or none; then ask each layer which kernel it runs."""
    undo: list[Undo] = []
    old = {module: _qualified(_old_class(module)) for _, module, *_ in plan}
    try:
        for name, module, _, reason, _ in plan:
            if reason is None:
                undo += _checked(name, module, _swap)
        return [_entry(name, module, old[module], adapter, *rest) for name, module, adapter, *rest in plan]
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _old_class(module: nn.Module) -> type:
    return type(module).__bases__[-1] if _is_fused(type(module)) else type(module)


def _swap(module: nn.Module) -> list[Undo]:
    """Swap one class; how to undo it. A layer that is fused already only has its weight looked at again."""
    fused = _fused_class(module)
    undo: list[Undo] = fused._prepare(module)
    if type(module) is not fused:
        drop_own_forward(module)
        module.__class__ = fused
        undo.append(lambda: _restore(module))
    return undo


def _probe_linear(layer: Any) -> list:
    """The choice of the kernel for one row of zeros; hooks are for calls that somebody made."""
    x = torch.zeros(1, layer.in_features, dtype=layer._input_dtype, device=layer.weight.device)
    return dispatch.probe(type(layer).forward, layer, x)


def _look(module: nn.Module) -> list:
    """What `_probe` records, where there is anything to ask about."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return ["its kernel is chosen once its parameters have left the meta device"]
    return getattr(type(module), "_probe", _probe_linear)(module)


def _entry(
    name: str,
    module: nn.Module,
    old_class: str,
    adapter: tuple[str, nn.Module] | None,
    reason: str | None,
    wanted: bool,
) -> Entry:
    if reason is not None:
        new_class = _qualified(type(module)) if _is_fused(type(module)) else None  # excluded, but fused earlier
        return Entry(name, old_class, new_class, None, None, reason, "left" if wanted else "excluded")
    recorded = _checked(name, module, _look)
    chosen = next((step for step in recorded if isinstance(step, dispatch.Explanation)), None)
    notes = [str(step) for step in recorded if not isinstance(step, dispatch.Explanation)]
    status = "base" if adapter is not None and _is_fused(type(adapter[1])) else "replaced"
    fields = (name, old_class, _qualified(type(module)))
    if chosen is None:
        return Entry(*fields, None, None, "; ".join(notes), status)
    passed_over = tuple(chosen.passed_over.items())
    return Entry(*fields, chosen.op, chosen.chosen, "; ".join(notes) or None, status, passed_over)
