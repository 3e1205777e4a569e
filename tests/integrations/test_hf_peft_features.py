"""Every feature of Hugging Face PEFT's LoRA layers works while they are replaced."""

import copy
import io

import pytest
import torch
from tiny import KINDS, One, check_layer, close, inputs, lora_model, quiet, replaced
from torch import nn

import peft_kernels as pk

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_classes(kind):
    model, layer, stock = replaced(kind)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True))
    old = type(stock.base_model.model.proj)
    assert isinstance(layer, old) and type(layer) is not old
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind):
    model, layer, stock = replaced(kind)
    x = inputs()
    before = model(x)
    if kind == "undeclared-4bit":
        pytest.skip("PEFT itself cannot merge a plain lora.Linear over a 4-bit layer")
    for m in (model, stock):
        quiet(m.merge_adapter)
    close(model(x), stock(x), BF16)
    explained = pk.explain(layer, x)
    assert "merged into the base layer" in explained and ("linear_4bit" in explained) == (kind == "4bit")
    for m in (model, stock):
        quiet(m.unmerge_adapter)
    close(model(x), stock(x), BF16)
    assert "lora_linear" in pk.explain(layer, x)
    assert not torch.isnan(before).any()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_merge_and_unload(kind):
    model, _, stock = replaced(kind)
    ours, theirs = quiet(model.merge_and_unload), quiet(stock.merge_and_unload)
    x = inputs()
    close(ours(x), theirs(x), BF16)
    pk.restore_layers(ours)
    assert type(ours.proj) is type(theirs.proj)


@pytest.mark.parametrize("kind", KINDS)
def test_disable_adapter(kind):
    model, layer, stock = replaced(kind)
    x = inputs()
    with model.disable_adapter(), stock.disable_adapter():
        close(model(x), stock(x), BF16)
        assert "adapters are disabled" in pk.explain(layer, x)
    close(model(x), stock(x), BF16)


def test_disabling_merged_adapters_unmerges_but_explaining_does_not():
    model, layer, _ = replaced("dense")
    x = inputs()
    model.merge_adapter()
    with model.disable_adapter():
        assert "adapters are disabled" in pk.explain(layer, x)
        assert layer.merged
        model(x)
        assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_and_go(kind):
    """add_adapter, set_adapter, add_weighted_adapter and delete_adapter on a replaced model."""
    model, layer, stock = replaced(kind)
    x = inputs()
    config = peft.LoraConfig(r=7, lora_alpha=3, target_modules=["proj"], init_lora_weights=False)
    for m in (model, stock):
        torch.manual_seed(2)
        m.add_adapter("second", config)
        m.set_adapter("second")
    close(model(x), stock(x), BF16)
    for m in (model, stock):
        m.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type="cat")
        m.set_adapter("both")
    close(model(x), stock(x), BF16)
    for m in (model, stock):
        m.delete_adapter("both")
        m.delete_adapter("second")
        m.set_adapter("default")
    close(model(x), stock(x), BF16)
    assert "lora_linear" in pk.explain(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_this_layer_lacks(kind):
    model, layer, stock = replaced(kind)
    for m in (model, stock):
        m.base_model.model.proj._active_adapter = "elsewhere"
    close(model(inputs()), stock(inputs()), BF16)
    assert "none of the active adapters" in pk.explain(layer, inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch(kind):
    model, _, stock = replaced(kind, adapters=("one", "two"))
    names = ["two", "__base__", "one", "two", "one"]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            close(model.eval()(inputs(), adapter_names=names), stock.eval()(inputs(), adapter_names=names), BF16)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_explained_and_checked(kind):
    _, layer, _ = replaced(kind)
    assert "adapter_names" in pk.explain(layer, inputs(), adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(inputs(), adapter_names=["default"])


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_dora_is_left_to_peft(kind):
    model, layer = lora_model(kind, use_dora=True)
    stock = copy.deepcopy(model)
    report = pk.replace_layers(model)
    assert [entry.reason for entry in report.left] == [
        "there is no kernel for adapter 'default', a Dora variant of LoRA"
    ]
    close(model(inputs()), stock(inputs()), BF16)
    config = peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    for m in (model, stock):
        torch.manual_seed(2)
        m.add_adapter("plain", config)
    assert not pk.replace_layers(model).left
    for name, expected in (("default", "a Dora variant"), ("plain", "lora_linear")):
        for m in (model, stock):
            m.set_adapter(name)
        close(model(inputs()), stock(inputs()), BF16)
        assert expected in pk.explain(layer, inputs())


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_inner_hooks_run(where, hook):
    model, layer, _ = replaced("dense")
    calls = []
    handle = getattr(layer.get_submodule(where), hook)(lambda *args: calls.append(where))
    model(inputs().requires_grad_()).sum().backward()
    assert calls == [where]
    assert "hooks" in pk.explain(layer, inputs())
    handle.remove()
    assert "lora_linear" in pk.explain(layer, inputs())


def test_outer_hooks_run():
    model, layer, _ = replaced("dense")
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    model(inputs())
    assert calls == [1] and "lora_linear" in pk.explain(layer, inputs())


def test_unknown_dropout_and_adapter_modules_are_left_to_peft():
    model, layer, stock = replaced("dense")
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)
    assert "a dropout of class AlphaDropout" in pk.explain(layer, inputs())
    close(model(inputs()), stock(inputs()), BF16)
    layer.lora_dropout["default"] = nn.Identity()
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])
    assert "made of Sequential" in pk.explain(layer, inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(kind):
    model, layer, _ = replaced(kind)
    twin = copy.deepcopy(model)
    x = inputs()
    assert type(twin.base_model.model.proj) is type(layer)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for parameter in layer.base_layer.parameters():
            parameter.zero_()
    assert not torch.equal(twin(x), model(x))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), twin(x))


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_adapter_dtype(enabled):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
    model = peft.get_peft_model(One(nn.Linear(128, 48).to(BF16)), config, autocast_adapter_dtype=enabled)
    layer = model.base_model.model.proj
    if not enabled:
        layer.lora_A.to(BF16), layer.lora_B.to(BF16)
    assert layer.lora_A["default"].weight.dtype == (F32 if enabled else BF16)
    check_layer(layer, inputs())
