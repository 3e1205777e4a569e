"""Prefix-tuning: a replaced Hugging Face PEFT model against PEFT itself."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
import transformers
from prompt_models import CONFIGS, base_model, batch, check, pair, run
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
from peft_kernels import dispatch

FAMILIES = list(CONFIGS)
TOKENS = 5
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def config(**options):
    return peft.PrefixTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS, **options})


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, dtype):
    ours, theirs, report = pair(family, config(), dtype)
    assert report.counts["replaced"] == 1 and not report.left, str(report)
    check(ours, theirs)
    check(ours, theirs, left_padding=())


def test_projection():
    ours, theirs, _ = pair("llama", config(prefix_projection=True, encoder_hidden_size=12))
    check(ours, theirs)
    assert len(run(ours, batch())) == 6  # logits, the embedding, and weights and biases of two layers


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    ours, theirs, _ = pair(family, config())
    assert torch.equal(ours.generate(**batch(), **GREEDY), theirs.generate(**batch(), **GREEDY))
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(ours.generate(**batch(), **beams), theirs.generate(**batch(), **beams))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_refused(family):
    """It drops the cache, and with it the prefix, which then would not be trained."""
    ours, theirs, _ = pair(family, config())
    ours.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"prefix-tuning.*gradient_checkpointing_disable"):
        ours(**batch())
    same(ours.eval()(**batch()).logits, theirs.eval()(**batch()).logits)
    ours.gradient_checkpointing_disable()
    check(ours, theirs)


@pytest.mark.parametrize("window", [4, 12, 40], ids=lambda w: f"window-{w}")
def test_prefix_slides_out_of_the_window_as_in_peft(window):
    ours, theirs, _ = pair("mistral", config(), sliding_window=window)
    check(ours, theirs, batches=2)
    check(ours, theirs, left_padding=(), batches=2)
    assert torch.equal(ours.generate(**batch(), **GREEDY), theirs.generate(**batch(), **GREEDY))


def test_dropout_of_attention_weights_covers_the_prefix():
    """The same mask, which torch draws for prefix and keys together, and so the same numbers."""
    ours, theirs, _ = pair("llama", config(), attention_dropout=0.4)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        results.append(run(model, batch()))
    for name, expected in results[1].items():
        same(results[0][name], expected)
    same(ours.eval()(**batch()).logits, theirs.eval()(**batch()).logits)


def test_tokens_in_pieces_against_the_cache():
    """Several tokens at once after others, whose mask is neither empty nor square."""
    ours, theirs, _ = pair("llama", config())
    x = batch(left_padding=())
    for model, results in ((ours, a := []), (theirs, b := [])):
        out = model(input_ids=x["input_ids"][:, :4])
        assert out.past_key_values.get_seq_length() == TOKENS + 4
        for piece in (x["input_ids"][:, 4:8], x["input_ids"][:, 8:]):
            out = model.base_model(input_ids=piece, past_key_values=out.past_key_values)
            results.append(out.logits)
    for ours_logits, expected in zip(a, b, strict=True):
        same(ours_logits, expected)


def test_cache_layer_holds_what_transformers_own_holds():
    """Through growth, cuts, reordering, other inference modes; and what it gave before stays as it was."""
    from transformers.cache_utils import DynamicLayer

    from peft_kernels.integrations.transformers import PrefixLayer

    ours, theirs, given = PrefixLayer(*torch.randn(2, 3, TOKENS, 8)), DynamicLayer(), []

    def step(length, context=torch.no_grad):
        with context():
            states = torch.randn(2, 2, 3, length, 8)
            for a, b in zip(ours.update(*states), theirs.update(*states), strict=True):
                assert torch.equal(a, b)
                given.append((a, b))

    for length in (4, 1, 1, 100, 1):
        step(length)
    for change in (lambda c: c.crop(-1), lambda c: c.reorder_cache(torch.tensor([1, 1])), lambda c: c.reset()):
        change(ours), change(theirs)
        given.clear()  # a cut may be written over
        for context in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
            step(1, context)
    assert ours.get_seq_length() == TOKENS + theirs.get_seq_length() == TOKENS + 4
    assert ours.get_mask_sizes(3) == (4 + 3, TOKENS)
    assert len(given) == 8 and all(torch.equal(a, b) for a, b in given)


class _Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.untyped_storage().nbytes():
                self.seen.append((tuple(tensor.shape), tensor.untyped_storage().nbytes() // tensor.element_size()))
        return result


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_of_batch_times_prefix_is_allocated(backend):
    """Neither forward nor backward; the reference, and PEFT, do, so that the test would notice."""
    if backend == "native" and (reason := dispatch.why_not("prefix_attention", "native", torch.device("cpu"), ())):
        pytest.skip(reason)
    tokens, rows = 37, 3
    ours, theirs, _ = pair("llama", config(num_virtual_tokens=tokens))
    inputs = batch(left_padding=())
    counts = []
    with pk.use_backend(backend):
        for model in (ours, theirs):
            with _Shapes() as shapes:
                out = model(**inputs, labels=inputs["input_ids"])
                out.loss.backward()
            wide = [s for s, stored in shapes.seen if {tokens, tokens + 9} & set(s) and s[0] == rows and len(s) == 4]
            counts.append(len([s for s in wide if s[-1] == 16]))
    assert counts[1] > 0
    assert (counts[0] == 0) == (backend == "native")


def test_checkpoint_goes_both_ways(tmp_path):
    ours, theirs, _ = pair("llama", config())
    torch.nn.init.normal_(ours.prompt_encoder["default"].embedding.weight)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours")
    assert type(loaded) is peft.PeftModelForCausalLM and loaded.active_peft_config.inference_mode
    expected = loaded(**batch()).logits
    same(ours(**batch()).logits, expected)
    assert pk.replace_layers(loaded).counts["replaced"] == 1
    same(loaded(**batch()).logits, expected)
    assert torch.equal(loaded.generate(**batch(), **GREEDY), ours.generate(**batch(), **GREEDY))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "peft_kernels" not in ours.base_model.config.to_json_string()


def test_restore():
    ours, theirs, _ = pair("llama", config())
    pk.restore_layers(ours)
    assert type(ours) is peft.PeftModelForCausalLM and ours.config._attn_implementation == "sdpa"
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    assert set(ours.__dict__) == set(theirs.__dict__)


def test_disabled_adapter_is_the_base_model():
    ours, _, _ = pair("llama", config())
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(**batch()).logits, base_model("llama").eval()(**batch()).logits)


def test_another_attention_function_set_afterwards_runs_as_peft_has_it():
    ours, theirs, _ = pair("llama", config())
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    assert "left to PEFT: its attention implementation is eager" in pk.explain(ours, **batch())


def test_report_and_explain():
    ours, _, report = pair("llama", config())
    entry = report.replaced[0]
    assert entry.old_class == "peft.peft_model.PeftModelForCausalLM" and entry.op == "prefix_attention"
    assert "prefix_attention" in pk.explain(ours, **batch())
    assert pk.replace_layers(ours) == report


def _eager():
    model = base_model("llama")
    model.set_attn_implementation("eager")
    return model


def _opt():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 8, "num_hidden_layers": 1, "vocab_size": 50}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, num_attention_heads=2))


MULTITASK = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
LEFT = {
    "eager": (_eager, config(), "its attention implementation is eager"),
    "family": (_opt, config(), "not tested with opt models"),
    "method": (lambda: base_model("llama"), MULTITASK, "no kernel for MULTITASK_PROMPT_TUNING"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case):
    make, peft_config, reason = LEFT[case]
    model = peft.get_peft_model(make(), peft_config)
    before = type(model), model.config._attn_implementation
    report = pk.replace_layers(model)
    assert not report.replaced and reason in report.left[0].reason
    assert (type(model), model.config._attn_implementation) == before


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_sequence_classification(family):
    models = []
    for _ in range(2):
        base = base_model(family, auto=transformers.AutoModelForSequenceClassification, num_labels=3)
        torch.manual_seed(1)
        models.append(peft.get_peft_model(base, config(task_type="SEQ_CLS")))
    assert pk.replace_layers(models[0]).counts["replaced"] == 1
    inputs = {**batch(), "labels": torch.tensor([0, 2, 1])}
    results = []
    for model in models:
        out = model(**inputs)
        out.loss.backward()
        results.append({"logits": out.logits} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in results[1].items():
        same(results[0][name], expected)


def test_two_adapters():
    ours, theirs, _ = pair("llama", config())
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.add_adapter("longer", config(num_virtual_tokens=8))
        model.set_adapter("longer")
    same(ours(**batch()).logits, theirs(**batch()).logits)
    assert copy.deepcopy(ours)(**batch()).past_key_values.get_seq_length() == 8 + 9
