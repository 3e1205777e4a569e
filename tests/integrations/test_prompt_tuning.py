"""Prompt tuning and P-tuning: a replaced Hugging Face PEFT model against PEFT itself."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
import transformers
from prompt_models import base_model, batch, check, pair

import peft_kernels as pk

COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
CONFIGS = {
    "prompt": peft.PromptTuningConfig(**COMMON),
    "vocabulary": peft.PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    "mlp": peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=16),
    "lstm": peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "family, dtype", [("llama", torch.float32), ("qwen2", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_logits_and_gradients(family, dtype, kind):
    ours, theirs, report = pair(family, CONFIGS[kind], dtype)
    assert report.counts["replaced"] == 1 and report.replaced[0].op == "prompt_embedding", str(report)
    check(ours, theirs)


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
def test_generate(kind):
    ours, theirs, _ = pair("llama", CONFIGS[kind])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch(), **options), theirs.generate(**batch(), **options))


def test_checkpoint_goes_both_ways(tmp_path):
    ours, _, _ = pair("llama", CONFIGS["mlp"])
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path)
    expected = loaded(**batch()).logits
    assert pk.replace_layers(loaded).counts["replaced"] == 1
    torch.testing.assert_close(loaded(**batch()).logits, expected)
    torch.testing.assert_close(ours(**batch()).logits, expected)


def test_restore_and_disable():
    ours, theirs, _ = pair("llama", CONFIGS["prompt"])
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(**batch()).logits, base_model("llama").eval()(**batch()).logits)
    pk.restore_layers(ours)
    assert type(ours) is peft.PeftModelForCausalLM
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_embeddings_given_go_to_peft():
    ours, theirs, _ = pair("llama", CONFIGS["prompt"])
    embedded = torch.randn(2, 7, 64)
    assert torch.equal(ours(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)
    assert "left to PEFT: it was given inputs_embeds" in pk.explain(ours, inputs_embeds=embedded)


def test_hooks_on_the_embedding_are_called():
    ours, theirs, _ = pair("llama", CONFIGS["prompt"])
    for model in (ours, theirs):
        model.word_embeddings.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    assert "left to PEFT: its word embeddings have hooks" in pk.explain(ours, **batch())


def test_other_tasks_are_left_alone():
    base = base_model("llama", auto=transformers.AutoModelForSequenceClassification)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    report = pk.replace_layers(model)
    assert "PROMPT_TUNING has a kernel in PeftModelForCausalLM only" in report.left[0].reason
