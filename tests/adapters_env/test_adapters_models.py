"""Models of the `adapters` library while replaced: every configuration it ships, every composition, its features."""

import copy
import pickle
import re

import pytest
import torch

import peft_kernels as pk

NEEDS = "needs the adapters library and its transformers, which `make test-adapters` installs apart"
adapters = pytest.importorskip("adapters", reason=NEEDS)
from adapters import composition as compose  # noqa: E402
from tiny_adapters import (  # noqa: E402
    allow_stochastic_depth,
    bert,
    check_model,
    inputs,
    llama,
    run_model,
    tokens,
)

from peft_kernels.integrations.on_demand import OnDemand  # noqa: E402
from peft_kernels.testing import assert_within_budget  # noqa: E402

allow_stochastic_depth()
SEQ = adapters.SeqBnConfig(reduction_factor=4)
SEQ2 = adapters.SeqBnConfig(reduction_factor=6, non_linearity="gelu", ln_before=True)
DOUBLE = adapters.DoubleSeqBnConfig(reduction_factor=8)
PAR = adapters.ParBnConfig()
PAR2 = adapters.ParBnConfig(scaling="learned", reduction_factor=3)

# What `config=` may name, by the number of adapters that the two layers then get, and how many of them are replaced.
SHIPPED = {
    **dict.fromkeys(("seq_bn", "seq_bn_inv", "par_bn", "scaled_par_bn", "mam"), (2, 2)),
    **dict.fromkeys(("double_seq_bn", "double_seq_bn_inv"), (4, 4)),
    "unipelt": (2, 2),
    "compacter++[reduction_factor=6]": (2, 0),
    "compacter[reduction_factor=6]": (4, 0),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration(name):
    found, replaced = SHIPPED[name]
    report = check_model(bert(name), replaced)
    assert len(report.entries) == found
    assert all("Kronecker products" in entry.reason for entry in report.left)


MODELS = {
    "adapter_plus": adapters.AdapterPlusConfig(reduction_factor=6, stochastic_depth=0.5),
    "after_ln-gating": adapters.SeqBnConfig(reduction_factor=4, residual_before_ln=False, use_gating=True),
    "double_seq_bn": DOUBLE,
    "par_bn": PAR,
}


@pytest.mark.parametrize("make", [bert, llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_models(make, name):
    check_model(make(MODELS[name]), 4 if name == "double_seq_bn" else 2)


def test_residual_from_between_the_layers_own_addition_and_norm():
    check_model(bert(adapters.SeqBnConfig(reduction_factor=4, residual_before_ln="post_add")), 2)


def test_bfloat16():
    check_model(bert(SEQ2, dtype=torch.bfloat16), 2)


COMPOSITIONS = {
    "stack": compose.Stack("a", "b"),
    "stack-3": compose.Stack("c", "a", "b"),
    "parallel": compose.Parallel("a", "b"),
    "split": compose.Split("a", "b", splits=[2, 4]),
    "batch_split": compose.BatchSplit("a", "b", batch_sizes=[1, 3]),
    "average": compose.Average("a", "b", weights=[0.3, 0.7]),
    "stack-parallel": compose.Stack("a", compose.Parallel("b", "c")),
    "stack-split": compose.Stack("a", compose.Split("b", "c", splits=[5, 1])),
    "fuse": compose.Fuse("a", "b"),
    "stack-fuse": compose.Stack("c", compose.Fuse("a", "b")),
}


def composed(name, *configs):
    model = bert(*configs)
    if "fuse" in name:
        model.add_adapter_fusion(["a", "b"])
    model.active_adapters = COMPOSITIONS[name]
    return model


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name, monkeypatch):
    """Only fusion reads what the adapters add, so only there is it computed apart."""
    computed = []
    value = OnDemand.value
    monkeypatch.setattr(OnDemand, "value", lambda tensor: computed.append(1) or value(tensor))
    check_model(composed(name, SEQ, SEQ2, SEQ), 6)
    assert bool(computed) == ("fuse" in name)


def test_stack_of_parallel_adapters():
    check_model(composed("stack", PAR, PAR2), 4)


@pytest.mark.parametrize("excluded", ["a", "b"])
@pytest.mark.parametrize("name", ["stack", "parallel", "batch_split", "fuse"])
def test_composition_with_an_adapter_left_alone(name, excluded):
    model = composed(name, SEQ, SEQ2)
    stock = run_model(model)
    assert pk.replace_layers(model, exclude=f"adapters.{excluded}").counts == {
        "replaced": 2,
        "base": 0,
        "left": 0,
        "excluded": 2,
    }
    for name, result in run_model(model).items():
        torch.testing.assert_close(result, stock[name], rtol=1e-4, atol=1e-5)


def test_stack_is_the_composition_of_the_references():
    model = bert(SEQ, SEQ2)
    model.active_adapters = compose.Stack("a", "b")
    layer = model.encoder.layer[0].output
    hidden, skipped, dy = inputs(2, 5, 48), inputs(2, 5, 48, seed=4), inputs(2, 5, 48, seed=5)

    def adapted(adapter, x, residual, **options):
        down, up = adapter.adapter_down[-2], adapter.adapter_up
        weights = (down.weight, down.bias, up.weight, up.bias)
        return pk.reference.bottleneck_adapter(x, *weights, residual=residual, **options)

    def composed_references(hidden, skipped, layer_norm):
        first, second = layer.adapters["a"], layer.adapters["b"]
        norm = second.adapter_norm_before
        hidden = adapted(first, layer_norm(hidden + skipped), hidden, activation="relu")
        options = {"activation": "gelu", "ln_weight": norm.weight, "ln_bias": norm.bias}
        hidden = adapted(second, layer_norm(hidden + skipped), hidden, **options)
        return layer_norm(hidden + skipped)

    def gradients(forward, dtype):
        layer.to(dtype).zero_grad()
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, skipped)]
        y = forward(*leaves, layer.LayerNorm)
        y.backward(dy.to(dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in layer.adapters.parameters())]

    truth = gradients(composed_references, torch.float64)
    theirs = gradients(layer.bottleneck_layer_forward, torch.float32)
    assert pk.replace_layers(layer).counts["replaced"] == 2
    ours = gradients(layer.bottleneck_layer_forward, torch.float32)
    for tensors in zip(ours, truth, theirs, strict=True):
        assert_within_budget(*tensors)


def test_scores():
    """Gating scores and fusion attentions that the model is asked for."""
    gating = adapters.SeqBnConfig(use_gating=True)
    model = bert(gating)
    stock = model(tokens(), output_adapter_gating_scores=True).adapter_gating_scores
    pk.replace_layers(model)
    scores = model(tokens(), output_adapter_gating_scores=True).adapter_gating_scores
    for i in range(2):
        ours, theirs = scores["a"][i]["output_adapter"], stock["a"][i]["output_adapter"]
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
    model = composed("fuse", SEQ, SEQ2)
    pk.replace_layers(model)
    attentions = model(tokens(), output_adapter_fusion_attentions=True).adapter_fusion_attentions
    assert set(attentions["a,b"]) == {0, 1}


def test_saved_adapters_are_the_librarys(tmp_path):
    model = bert(SEQ2)
    before = copy.deepcopy(model.state_dict())
    pk.replace_layers(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_adapter(str(tmp_path), "a")
    for replaced in (False, True):
        other = bert(SEQ)
        other.load_adapter(str(tmp_path), load_as="b", set_active=True)
        if replaced:
            assert pk.replace_layers(other).counts["replaced"] == 4
        torch.testing.assert_close(other(tokens())[0], model(tokens())[0])


def test_adapters_come_and_go():
    model = bert(SEQ)
    assert pk.replace_layers(model).counts["replaced"] == 2
    model.add_adapter("late", config=PAR, set_active=True)
    assert {re.sub(r".*\.", "", entry.name) for entry in pk.replace_layers(model).replaced} == {"a", "late"}
    plain = copy.deepcopy(model)
    pk.restore_layers(plain)
    for setup in ("late", "a", compose.Stack("a", "late"), None):
        for each in (model, plain):
            each.set_active_adapters(setup)
        torch.testing.assert_close(model(tokens())[0], plain(tokens())[0], rtol=1e-4, atol=1e-5)
    model.average_adapter("mean", ["a", "a"], weights=[0.5, 0.5])
    model.delete_adapter("late")
    assert pk.replace_layers(model).counts["replaced"] == 4


def test_restore():
    model = bert(SEQ, PAR2)
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    before = run_model(model)
    pk.replace_layers(model)
    run_model(model)
    replaced = [type(module) for module in model.modules()]
    assert sum(old is not new for old, new in zip(classes, replaced, strict=True)) == 4
    assert all(issubclass(new, old) for old, new in zip(classes, replaced, strict=True))
    pk.restore_layers(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = run_model(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_strict_and_include():
    model = bert("compacter[reduction_factor=6]", SEQ)
    with pytest.raises(RuntimeError, match=r"strict: 4 layers must be left alone(.|\n)*Kronecker"):
        pk.replace_layers(model, strict=True)
    report = pk.replace_layers(model, include="layer.1.output.adapters.b", strict=True)
    assert [entry.name for entry in report.replaced] == ["encoder.layer.1.output.adapters.b"]
    assert "encoder.layer.*.output.adapters.a (2 layers)" in str(report)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(clone):
    model = bert(SEQ)
    pk.replace_layers(model)
    layer = model.encoder.layer[0].output.adapters["a"]
    twin, x = clone(layer), inputs(2, 3, 48)
    assert type(twin) is type(layer) and torch.equal(twin(x, x)[0], layer(x, x)[0])


def test_gradient_checkpointing_repeats_the_masks():
    model = bert(adapters.SeqBnConfig(reduction_factor=4, dropout=0.3))
    pk.replace_layers(model)
    plain = run_model(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = run_model(model)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_training_step_equals_the_librarys():
    """Two optimizer steps later the parameters are still the same."""
    models = bert(SEQ2), bert(SEQ2)
    pk.replace_layers(models[0])
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            run_model(model)
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
