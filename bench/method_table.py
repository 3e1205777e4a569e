"""Measures each PEFT method on one base model: size, training step, memory, inference, merging."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peft_kernels as pk

from . import memory, timing
from .cases.smollm2 import Trainer
from .methods import METHODS, Method, base, trained

# The fused model's gradients against the unfused one's, relative root-mean-square: the spread of the dtype itself.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
UNFUSED, FUSED = "unfused", "fused"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """On what the methods are measured."""

    model: str
    device: torch.device
    dtype: torch.dtype
    effort: timing.Effort
    batch: int
    sequence: int

    def ids(self, vocab: int) -> torch.Tensor:
        """The same random tokens on every run."""
        tokens = torch.randint(vocab, (self.batch, self.sequence), generator=torch.Generator().manual_seed(0))
        return tokens.to(self.device)


def rows(setting: Setting, methods: tuple[Method, ...] = METHODS) -> Iterator[Row]:
    """The unfused and the fused row of each method; one that fails says why, and the others go on."""
    for method in methods:
        reason = method.why_not()
        try:
            yield from measured(method, setting) if reason is None else [absent(method, UNFUSED, reason)]
        except Exception as error:  # a method that a version of PEFT cannot run is a result too
            yield absent(method, UNFUSED, f"{type(error).__name__}: {error}".splitlines()[0])


def absent(method: Method, way: str, reason: str) -> Row:
    return {"method": method.name, "paper": method.paper, "way": way, "why_not": reason}


def measured(method: Method, setting: Setting) -> Iterator[Row]:
    """The rows of a method; the training steps are timed interleaved, and so is inference beside the bare base."""
    bare = base(setting.model, setting.dtype, setting.device, quantized=method.quantized)
    ids = setting.ids(bare.config.vocab_size)
    models = {UNFUSED: trained(method, fresh(method, setting)), FUSED: trained(method, fresh(method, setting))}
    report = pk.replace_layers(models[FUSED])
    why_not = {FUSED: unserved(report) or differs(models, ids, setting.dtype)}
    sound = {way: model for way, model in models.items() if not why_not.get(way)}
    steps = {way: Trainer(model, [ids]) for way, model in sound.items()}
    step_times = timing.measure({way: [step] for way, step in steps.items()}, setting.effort, device=setting.device)
    peaks = {way: memory.of_call(step, setting.device) for way, step in steps.items()}
    facts = {way: size(model) for way, model in sound.items()}
    del steps
    forwards = {way: [forward(model, ids)] for way, model in {"base": bare, **sound}.items()}
    forward_times = timing.measure(forwards, setting.effort, device=setting.device)
    for way in models:
        if way not in sound:
            yield absent(method, way, why_not[way])
            continue
        overhead = timing.ratio(forward_times[way], forward_times["base"])
        yield {
            "method": method.name,
            "paper": method.paper,
            "way": way,
            **facts[way],
            "step_seconds": timing.quantiles(step_times[way]),
            "step_peak_bytes": peaks[way],
            "overhead": {name: value - 1 for name, value in overhead.items()},
            "merge": merge(method, way, bare, setting),
            "layers": report.counts if way == FUSED else None,
        }


def fresh(method: Method, setting: Setting) -> torch.nn.Module:
    """A base model of the method's kind."""
    return base(setting.model, setting.dtype, setting.device, quantized=method.quantized)


def unserved(report: pk.ReplacementReport) -> str | None:
    """Why the fused row would be the unfused one, or None."""
    if not report.replaced:
        return "no kernel serves it yet"
    running = [entry for entry in report.replaced if entry.op is not None]
    return None if running else f"calls go to PEFT: {report.replaced[0].reason}"


def differs(models: dict[str, torch.nn.Module], ids: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the fused model's gradients are not the unfused one's, or None: no speed without a passing check."""
    gradients = {}
    for way, model in models.items():
        model.train()(input_ids=ids, labels=ids).loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = [torch.zeros(p.numel()) if p.grad is None else p.grad.float().cpu().flatten() for p in parameters]
        gradients[way] = torch.cat(found)
        model.zero_grad()
    truth = gradients[UNFUSED].double()
    if not torch.isfinite(truth).all() or not truth.abs().max() > 0:
        return "the unfused gradients are zero or not finite"
    error = ((gradients[FUSED] - truth).square().mean() / truth.square().mean()).sqrt().item()
    return None if error <= TOLERANCE[dtype] else f"check failed: gradients differ by {error:.3g}"


def size(model: torch.nn.Module) -> Row:
    """Parameters and bytes; the adapter's bytes are those of its saved file."""
    tensors = [*model.parameters(), *model.buffers()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return {
        "trainable": sum(p.numel() for p in parameters),
        "adapter_bytes": adapter_bytes(model),
        "model_bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def adapter_bytes(model: torch.nn.Module) -> int:
    """What one task takes on disk: PEFT's own file, or the trained tensors of a model that PEFT did not make."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder)
        else:
            from safetensors.torch import save_file

            state = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(state, f"{folder}/adapter.safetensors")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def forward(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    """Inference of the whole batch without a cache."""
    model.eval()

    def call() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return call


def merge(method: Method, way: str, bare: torch.nn.Module, setting: Setting) -> Row:
    """Whether the adapter can become part of the base's weights, and what is left of it then.

    error: of the merged logits, relative root-mean-square; parameters: those that the base does not have; overhead: of
    inference over the bare base. A model of its own, and logits in training mode: bitsandbytes repacks a weight in its
    first inference on a CPU, and merging such a weight gives another model.
    """
    model = trained(method, fresh(method, setting))
    if way == FUSED:
        pk.replace_layers(model)
    ids = setting.ids(bare.config.vocab_size)
    before = logits(model, ids)
    if hasattr(model, "peft_config"):
        try:
            model = model.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
            return {"merges": False, "why_not": f"{type(error).__name__}: {error}".splitlines()[0]}
    # without it the trained parameters are the model's own, and there is nothing to merge
    after = logits(model, ids)
    calls = {"base": [forward(bare, ids)], "merged": [forward(model, ids)]}
    times = timing.measure(calls, setting.effort, device=setting.device)
    return {
        "merges": True,
        "error": ((after - before).square().mean() / before.square().mean()).sqrt().item(),
        "parameters": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in bare.parameters()),
        "overhead": timing.ratio(times["merged"], times["base"])["p50"] - 1,
    }


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """In training mode, in float64."""
    with torch.no_grad():
        return model.train()(input_ids=ids).logits.double()
