"""Measures each PEFT method on one base model: size, training step, memory, inference, merging."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import memory, timing
from .cases.smollm2 import Trainer
from .inputs import replaced
from .methods import METHODS, Method, base, trained

SAME = 5e-3  # root mean square, relative: float32 through a whole model with random prompts was off by up to 1.4e-3
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
    """The rows of a method; the training steps are timed interleaved, and so is inference beside the bare base.

    The base of the fused row has our kernels too, where there are any for it: overhead is what the method adds.
    """
    bare = fresh(method, setting)
    bases = {UNFUSED: bare, FUSED: replaced(fresh(method, setting)) if method.quantized else bare}
    ids = setting.ids(bare.config.vocab_size)
    models = {UNFUSED: trained(method, fresh(method, setting)), FUSED: trained(method, fresh(method, setting))}
    layers, unserved = method.fuse(models[FUSED])
    why_not = {FUSED: unserved or differs(method, models, setting)}
    sound = {way: model for way, model in models.items() if not why_not.get(way)}
    steps = {way: Trainer(model, [ids]) for way, model in sound.items()}
    step_times = timing.measure({way: [step] for way, step in steps.items()}, setting.effort, device=setting.device)
    peaks = {way: memory.of_call(step, setting.device) for way, step in steps.items()}
    facts = {way: size(steps[way]) for way in sound}
    del steps
    forwards = {way: [forward(model, ids)] for way, model in sound.items()}
    forwards |= {("base", way): [forward(bases[way], ids)] for way in sound}
    forward_times = timing.measure(forwards, setting.effort, device=setting.device)
    for way in models:
        if way not in sound:
            yield absent(method, way, why_not[way])
            continue
        overhead = timing.ratio(forward_times[way], forward_times["base", way])
        yield {
            "method": method.name,
            "paper": method.paper,
            "way": way,
            **facts[way],
            "step_seconds": timing.quantiles(step_times[way]),
            "step_peak_bytes": peaks[way],
            "inference_seconds": timing.quantiles(forward_times[way]),
            "overhead": {name: value - 1 for name, value in overhead.items()},
            "merge": merge(method, way, bases[way], setting),
            "layers": layers if way == FUSED else None,
        }


def fresh(method: Method, setting: Setting) -> torch.nn.Module:
    """A base model of the method's kind."""
    return base(setting.model, setting.dtype, setting.device, quantized=method.quantized)


def differs(method: Method, models: dict[str, torch.nn.Module], setting: Setting) -> str | None:
    """Why the fused model's gradients are wrong, or None: no speed without a passing check.

    In float32 they are the unfused model's. In the dtype to measure, half of them are at most twice as far from those
    as the unfused model's are: there random prompts tip single attentions over, in either model, and a mean would be
    made of these.
    """
    ids = setting.ids(models[UNFUSED].config.vocab_size)
    exact = {way: in_float32(trained(method, fresh(method, setting))) for way in models}
    method.fuse(exact[FUSED])
    truth = gradients(exact[UNFUSED], ids)
    if not torch.isfinite(truth).all() or not truth.abs().median() > 0:
        return "half of the unfused gradients are zero, or some are not finite"
    change = gradients(exact[FUSED], ids) - truth
    off = (change.square().mean() / truth.square().mean()).sqrt().item()
    if not off <= SAME:
        return f"check failed: in float32 gradients differ by {off:.3g}"
    fused, unfused = (median_error(gradients(models[way], ids), truth) for way in (FUSED, UNFUSED))
    limit = 2 * unfused + SAME
    return None if fused <= limit else f"check failed: gradients differ by {fused:.3g}, {limit:.3g} is allowed"


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """All gradients of a training step in one float64 vector; zeros for a parameter that has none."""
    model.train()(input_ids=ids, labels=ids).loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.zero_grad()
    return torch.cat([gradient.double().cpu().flatten() for gradient in found])


def median_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Median of the absolute difference, relative to that of the absolute truth."""
    return ((actual - truth).abs().median() / truth.abs().median()).item()


def size(trainer: Trainer) -> Row:
    """Parameters and bytes; the adapter's bytes are those of its saved file."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        "trainable": sum(p.numel() for p in trainer.parameters),
        "adapter_bytes": adapter_bytes(trainer.model),
        "model_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in states),
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


def merge(method: Method, way: str, base: torch.nn.Module, setting: Setting) -> Row:
    """Whether the adapter can become part of the base's weights, and what is left of it then.

    error: of the merged logits; rounding: of the logits before, both against the unmerged model in float32 (`error`).
    parameters: those that the base does not have; overhead: of inference over the base. A model of its own, and logits
    in training mode: bitsandbytes repacks a weight in its first inference on a CPU, and merging such a weight gives
    another model.
    """
    if method.merge is None:
        return {"merges": False}
    ids = setting.ids(base.config.vocab_size)
    truth = logits(in_float32(trained(method, fresh(method, setting))), ids)
    model = trained(method, fresh(method, setting))
    if way == FUSED:
        method.fuse(model)
    before = logits(model, ids)
    model = method.merge(model)
    after = logits(model, ids)
    calls = {"base": [forward(base, ids)], "merged": [forward(model, ids)]}
    times = timing.measure(calls, setting.effort, device=setting.device)
    return {
        "merges": True,
        "error": error(after, truth),
        "rounding": error(before, truth),
        "parameters": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters()),
        "overhead": timing.ratio(times["merged"], times["base"])["p50"] - 1,
    }


def in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """The model computing in float32; 4-bit weights stay as they are, and are decoded to float32."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = module.compute_dtype = torch.float32
    return model.float()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """In training mode, in float64."""
    with torch.no_grad():
        return model.train()(input_ids=ids).logits.double()


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of a token's logits' difference, relative to that of its logits: the median over the tokens.

    A mean would be decided by the one token whose attention bfloat16's rounding tips over: SmolLM2 has such tokens.
    """
    return ((actual - truth).square().mean(-1) / truth.square().mean(-1)).sqrt().median().item()
