"""One process of the demo: `train` a LoRA on SmolLM2 with or without the kernels, or `verify` the saved adapter.

A process each, so that peak memory belongs to one run. Events go to stdout, one JSON object a line; bench/demo.py reads
them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.smollm2 import add_lora, load_smollm2, quantize_linears, text_batches

HELD_OUT = 3_000_000  # characters into the text, far behind the last training batch
PROMPT = "And it came to pass in those days, that"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both runs share."""

    steps: int = 40
    checkpoint: int = 10
    batch: int = 4
    seq: int = 128
    learning_rate: float = 3e-4
    new_tokens: int = 48


def emit(event: str, **fields: Any) -> None:
    """Tell the parent process."""
    print(json.dumps({"event": event, **fields}), flush=True)


def quantized_model() -> tuple[Any, Any, int]:
    """SmolLM2 in bfloat16 with the linear layers of its blocks in NF4, marked as `from_pretrained` would; how many."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    linears = quantize_linears(model)
    model.is_loaded_in_4bit = True
    return model, tokenizer, linears


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits in training mode: in eval mode bitsandbytes repacks CPU weights and rounds their scales to bfloat16."""
    return model.train()(input_ids=ids).logits.float()


def generate(model: Any, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Greedy text, and tokens per second after a short warm-up."""
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=2, **options)
    start = time.perf_counter()
    out = model.generate(**inputs, min_new_tokens=settings.new_tokens, max_new_tokens=settings.new_tokens, **options)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    return {"text": text, "tokens_per_second": settings.new_tokens / seconds}


def train(kind: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Fine-tune, then save the adapter and the logits of a held-out batch, then generate."""
    from safetensors.torch import save_file

    model, tokenizer, linears = quantized_model()
    model = add_lora(model)
    result: dict[str, Any] = {"linears": linears, "losses": [], "seconds": [], "held_out": {}}
    if kind == "kernels":
        import peft_kernels as pk

        result["replaced"] = str(pk.replace_layers(model))
    batches = text_batches(tokenizer, settings.seq, settings.batch)
    held_out = next(text_batches(tokenizer, settings.seq, settings.batch, start=HELD_OUT))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=settings.learning_rate)
    model.train()
    if memory.measurable():
        memory.forget_peak()
    for step in range(1, settings.steps + 1):
        ids = next(batches)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result["seconds"].append(time.perf_counter() - start)
        result["losses"].append(loss.item())
        emit("step", step=step, loss=loss.item(), seconds=result["seconds"][-1])
        if step % settings.checkpoint == 0 or step == settings.steps:
            with torch.no_grad():  # still in training mode: see `logits`
                result["held_out"][step] = model(input_ids=held_out, labels=held_out).loss.item()
    result["peak_bytes"] = memory.peak() if memory.measurable() else None
    result["step_seconds"] = statistics.median(result["seconds"][1:] or result["seconds"])

    emit("phase", text="save and generate")
    model.save_pretrained(folder / f"adapter-{kind}")
    tensors = {"logits": logits(model, held_out[:1])}
    result |= generate(model, tokenizer, settings)
    if kind == "kernels":
        pk.restore_layers(model)
        tensors["logits_restored"] = logits(model, held_out[:1])
    save_file(tensors, folder / f"{kind}.safetensors")
    return result


def verify(settings: Settings, folder: Path) -> dict[str, Any]:
    """The adapter trained with the kernels, in a plain PEFT model that never saw them: are its logits the same?

    The truth is the plain model in float32 over the same 4-bit weights. The kernels' error may be at most twice that
    of the plain bfloat16 model: the project's error budget.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    model, tokenizer, _ = quantized_model()
    plain = PeftModel.from_pretrained(model, str(folder / "adapter-kernels"))
    held_out = next(text_batches(tokenizer, settings.seq, settings.batch, start=HELD_OUT))
    eager = logits(plain, held_out[:1])
    saved = load_file(folder / "kernels.safetensors")
    plain.float()
    for module in plain.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    truth = logits(plain, held_out[:1])
    ours, theirs = saved["logits"] - truth, eager - truth
    return {
        "largest_logit": truth.abs().max().item(),
        "difference": (saved["logits"] - eager).abs().max().item(),
        "same_argmax": (saved["logits"].argmax(-1) == eager.argmax(-1)).float().mean().item(),
        "max_error": {"kernels": ours.abs().max().item(), "plain": theirs.abs().max().item()},
        "rms_error": {"kernels": ours.square().mean().sqrt().item(), "plain": theirs.square().mean().sqrt().item()},
        "restored_differs": int((saved["logits_restored"] != eager).sum()),
    }


def main() -> None:
    """`python -m bench.demo_worker plain|kernels|verify SETTINGS_JSON FOLDER`."""
    task, settings, folder = sys.argv[1], Settings(**json.loads(sys.argv[2])), Path(sys.argv[3])
    result = verify(settings, folder) if task == "verify" else train(task, settings, folder)
    (folder / f"{task}.json").write_text(json.dumps(result, indent=1))
    emit("done")


if __name__ == "__main__":
    main()
