"""LLaMA-Adapter: replaced layers of Hugging Face PEFT's ADAPTION_PROMPT against PEFT itself."""

import copy
from functools import partial

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
from prompt_models import base_model, batch, check, pair, run
from tiny import four_bit, no_repacking

import peft_kernels as pk
from peft_kernels import dispatch

FAMILIES = ["llama", "mistral", "gpt2"]  # those that PEFT has it for
CONFIG = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)


def models(family, dtype=torch.float32, gate=0.3, **changes):
    """A replaced model and PEFT's own, with the gates open."""
    ours, theirs, report = pair(family, CONFIG, dtype, **changes)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.data.fill_(gate)
    return ours, theirs, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, dtype):
    ours, theirs, report = models(family, dtype)
    assert report.counts["replaced"] == 1 and not report.left, str(report)
    check(ours, theirs, batches=16)
    check(ours, theirs, left_padding=(), batches=16)


def test_bias_of_the_output_projection_counts_twice_as_in_peft():
    ours, theirs, _ = models("llama", attention_bias=True)
    for model in (ours, theirs):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.data.normal_()
    check(ours, theirs, batches=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepare", [pk.prepare_scale_bias, partial(pk.prepare_bitfit, add_missing=True)])
def test_with_trained_scales_and_biases(prepare, dtype):
    """LLaMA-Adapter V2: the output projection is affine in its input still."""
    pair = []
    for _ in range(2):
        model = base_model("llama", dtype)
        prepare(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.manual_seed(4)
        model = peft.get_peft_model(model, copy.deepcopy(CONFIG))
        for parameter in trained:
            parameter.requires_grad_()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.fill_(0.3) if name.endswith("gate") else parameter.add_(torch.randn_like(parameter) / 8)
        pair.append(model)
    report = pk.replace_layers(pair[0])
    assert not report.left and [e.op for e in report.replaced].count("gated_prompt_attention") == 1, str(report)
    check(*pair, batches=16)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    ours, theirs, _ = models(family)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch(), **options), theirs.generate(**batch(), **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gate_is_the_base_model_bit_for_bit(family):
    if family != "gpt2" and (reason := dispatch.why_not("gated_prompt_attention", "native", torch.device("cpu"), ())):
        pytest.skip(f"the reference has an attention of its own; native: {reason}")
    ours, _, _ = models(family, torch.bfloat16, gate=0.0)
    with torch.no_grad():
        adapted = ours(**batch()).logits
        with ours.disable_adapter():
            assert torch.equal(ours(**batch()).logits, adapted)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_projections_run_once_for_a_token():
    """PEFT runs q_proj, v_proj and o_proj twice; here the prompt's few rows come again, whatever the batch."""
    ours, theirs, _ = models("llama")
    counts = []
    for model in (ours, theirs):
        rows = {"q_proj": [], "k_proj": [], "v_proj": [], "o_proj": []}
        attention = model.base_model.model.model.layers[1].self_attn.model
        for name, seen in rows.items():
            getattr(attention, name).register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.shape[:2].numel()))
        model(**batch())
        counts.append(rows)
    assert counts[0] == {"q_proj": [27], "k_proj": [4, 27], "v_proj": [4, 27], "o_proj": [27]}
    assert {name: sum(rows) for name, rows in counts[1].items()} == {
        "q_proj": 54,
        "k_proj": 31,
        "v_proj": 58,
        "o_proj": 54,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_of_attention_weights_leaves_the_prompt_alone(family):
    name = {"llama": "attention_dropout", "gpt2": "attn_pdrop"}[family]
    ours, theirs, _ = models(family, **{name: 0.4})
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        results.append(run(model, batch()))
    for key, expected in results[1].items():
        same(results[0][key], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_goes_both_ways(family, tmp_path):
    ours, theirs, _ = models(family)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path)
    expected = loaded(**batch()).logits
    same(ours(**batch()).logits, expected)
    assert pk.replace_layers(loaded).counts["replaced"] == 1
    same(loaded(**batch()).logits, expected)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_restore():
    ours, theirs, _ = models("llama")
    pk.restore_layers(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert ours.config._attn_implementation == "sdpa"
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_adapters_come_and_go():
    ours, theirs, _ = models("llama")
    second = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    for model in (ours, theirs):
        torch.manual_seed(8)
        model.add_adapter("second", second)
        model.set_adapter("second")
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.data.fill_(0.5)
    same(ours(**batch()).logits, theirs(**batch()).logits)  # not replaced: PEFT's layers under our attention function
    assert pk.replace_layers(ours).counts["replaced"] == 2
    same(ours(**batch()).logits, theirs(**batch()).logits)
    for model in (ours, theirs):
        model.set_adapter("default")
    same(ours(**batch()).logits, theirs(**batch()).logits)


def test_activation_checkpointing():
    ours, theirs, _ = models("llama")
    for model in (ours, theirs):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = run(theirs, batch())
    for name, value in run(ours, batch()).items():
        same(value, expected[name])


def test_4bit():
    bnb = pytest.importorskip("bitsandbytes")
    results = []
    for replaced in (True, False):
        base = base_model("llama")
        for name, module in list(base.model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                base.model.set_submodule(name, four_bit(module, torch.float32))
        torch.manual_seed(8)
        model = no_repacking(peft.get_peft_model(base, CONFIG))
        model.base_model.model.model.layers[1].self_attn.adaption_gate.data.fill_(0.4)
        if replaced:
            report = pk.replace_layers(model)
            assert report.counts == {"replaced": 15, "base": 0, "left": 0, "excluded": 0}, str(report)
        assert isinstance(model.base_model.model.model.layers[1].self_attn.model.o_proj, bnb.nn.Linear4bit)
        results.append(run(model, batch()))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-5)


def test_left_alone():
    ours, theirs, _ = models("llama")
    pk.restore_layers(ours)
    attention = ours.base_model.model.model.layers[1].self_attn.model
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["o_proj"], lora_dropout=0.1), attention)
    report = pk.replace_layers(ours)
    assert "its o_proj is of class peft.tuners.lora.layer.Linear, which may not be linear" in next(
        e.reason for e in report.left
    )
    pk.restore_layers(ours)
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    report = pk.replace_layers(theirs)
    assert not report.replaced and "its attention implementation is eager" in report.left[0].reason


def test_report_and_explain():
    ours, _, report = models("mistral")
    entry = report.replaced[0]
    assert entry.name.endswith("layers.1.self_attn") and entry.op == "gated_prompt_attention"
    assert "gated_prompt_attention" in pk.explain(ours, **batch())
    ours.set_attn_implementation("eager")
    assert "AdaptedAttention: left to PEFT: its attention implementation is eager" in pk.explain(ours, **batch())
