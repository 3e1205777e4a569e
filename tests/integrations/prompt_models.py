"""Tiny models with Hugging Face PEFT's prompt methods, and the comparison of two of them in every number."""

import copy

import peft
import torch
import transformers

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget

VOCABULARY, SIZES = 128, {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA_LIKE = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2, **IDS}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE),
    "mistral": transformers.MistralConfig(**LLAMA_LIKE),
    "qwen2": transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "gpt2": transformers.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=128,
        n_positions=64,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **IDS,
    ),
}


def base_model(family, dtype=torch.float32, auto=transformers.AutoModelForCausalLM, **changes):
    """A random model of a family."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    return auto.from_config(config, attn_implementation="sdpa").to(dtype)


def pair(family, config, dtype=torch.float32, seed=4, **changes):
    """The same PEFT model twice, the first one replaced, and its report."""
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        models.append(peft.get_peft_model(base_model(family, dtype, **changes), copy.deepcopy(config)))
    report = pk.replace_layers(models[0])
    return *models, report


def batch(rows=3, length=9, left_padding=(0, 2, 5), seed=7):
    """Token ids and an attention mask, rows padded on the left."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(left_padding[:rows]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, inputs):
    """Logits at real tokens, and the gradients of the loss for all that is trained, by name."""
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    real = inputs["attention_mask"].bool()
    logits = out.logits[:, -real.shape[1] :]
    return {"logits": logits[real].detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check(ours, theirs, *, left_padding=(0, 2, 5), batches=6):
    """Our results are at most twice as far from float64 as PEFT's own, every gradient included.

    Over a few batches, so that a gradient of one element, such as a gate's, does not hang on one lucky rounding.
    """
    exact_model = copy.deepcopy(theirs).double()
    inputs = [batch(left_padding=left_padding, seed=seed) for seed in range(batches)]
    ours, eager, exact = ([run(model, x) for x in inputs] for model in (ours, theirs, exact_model))
    assert ours[0].keys() == eager[0].keys() == exact[0].keys() and len(exact[0]) > 1
    for name in exact[0]:
        a, e, t = (torch.stack([results[name] for results in runs]) for runs in (ours, eager, exact))
        assert_within_budget(a, t, e, name)
        assert t.abs().max() > 0, f"{name}: nothing to compare"
