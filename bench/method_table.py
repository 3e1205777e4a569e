"""Measures each PEFT method on one base model: size, training step, memory, inference, merging."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_kernels.testing import BUDGET

from . import memory, timing
from .cases.smollm2 import Trainer
from .inputs import replaced
from .methods import METHODS, Method, base, trained
from .smollm2 import decoded

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

    The tests' budget: at most twice as far from the model in float64 as the unfused model's are. In float32 for each
    kind of parameter, root mean square, and one rounding. In the dtype to measure in the median over all gradients: in
    bfloat16 random prompts tip single attentions over, in either model, and a mean would be made of these.
    """
    ids = setting.ids(models[UNFUSED].config.vocab_size)
    truth = gradients(in_float64(method, models[UNFUSED], setting), ids)
    if not all(torch.isfinite(t).all() and t.any() for t in truth.values()):
        return "some gradients of the model in float64 are all zero, or not finite"
    exact = {way: in_float32(trained(method, fresh(method, setting))) for way in models}
    method.fuse(exact[FUSED])
    fused, unfused = (gradients(exact[way], ids) for way in (FUSED, UNFUSED))
    for kind, t in truth.items():
        limit = BUDGET * off(unfused[kind], t) + torch.finfo(torch.float32).eps
        if not (found := off(fused[kind], t)) <= limit:
            return f"check failed: in float32 gradients of {kind} differ by {found:.3g}, {limit:.3g} is allowed"
    fused, unfused = (gradients(models[way], ids) for way in (FUSED, UNFUSED))
    found, eager = (
        torch.cat([(gradient[kind] - t).abs() for kind, t in truth.items()]).median().item()
        for gradient in (fused, unfused)
    )
    limit = BUDGET * eager + torch.finfo(setting.dtype).tiny
    return None if found <= limit else f"check failed: gradients differ by {found:.3g}, {limit:.3g} is allowed"


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A training step's gradients in float64, one vector for each kind of parameter: those of all layers together."""
    model.train()(input_ids=ids, labels=ids).loss.backward()
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(gradient.double().cpu().flatten())
    model.zero_grad()
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def off(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the truth."""
    return ((actual - truth).square().mean() / truth.square().mean()).sqrt().item()


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

    error: of the merged logits; rounding: of the logits before, both against the unmerged model in float64 (`error`).
    parameters: those that the base does not have; overhead: of inference over the base. A model of its own, and logits
    in training mode: bitsandbytes repacks a weight in its first inference on a CPU, and merging such a weight gives
    another model.
    """
    if method.merge is None:
        return {"merges": False}
    ids = setting.ids(base.config.vocab_size)
    model = trained(method, fresh(method, setting))
    truth = logits(in_float64(method, model, setting), ids)
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


def in_float64(method: Method, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    """What the unfused model computes, in float64 but for what its library rounds itself (the norms, the loss)."""
    exact = trained(method, decoded(fresh(method, setting))).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = exact.load_state_dict(parameters, strict=False).unexpected_keys
    assert not unknown, f"the model in float64 has no {', '.join(unknown)}"
    return exact


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
