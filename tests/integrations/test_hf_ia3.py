"""Hugging Face PEFT's IA³ layers give the same numbers while replaced, and keep every feature."""

import copy

import pytest
import torch
from tiny import (
    KINDS,
    One,
    check_layer,
    close,
    four_bit,
    ia3_model,
    inputs,
    no_repacking,
    quiet,
    run,
    tiny_llama_base,
    tokens,
)
from torch import nn

import peft_kernels as pk

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

OP = "scaled_linear"
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


@pytest.fixture(autouse=True)
def kernels_for_small_layers(monkeypatch):
    """Else `auto` would leave the dense layers of these sizes to PEFT's own forward, and nothing would be compared."""
    monkeypatch.setattr("peft_kernels.ops.scaled_linear.vendor._SMALL", 0)


FORMS = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])


def replaced(kind, **options):
    """A replaced model, its layer, and a stock copy."""
    model, layer = ia3_model(kind, **options)
    stock = no_repacking(copy.deepcopy(model))
    report = pk.replace_layers(model)
    assert report.counts["replaced"] == 1 and not report.left, str(report)
    return model, layer, stock


def agree(ours, theirs, dtype):
    """All results of `run`, dtypes too."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        close(ours[name], theirs[name], dtype)


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_numbers(backend, kind, dtype, feedforward):
    _, layer = ia3_model(kind, dtype=dtype, feedforward=feedforward)
    ours, theirs = check_layer(layer, inputs(dtype))
    assert ours["y"].dtype == theirs["y"].dtype == (F32 if kind == "4bit" else dtype)
    assert ours["ia3_l.default"].abs().max() > 0


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"adapters": ("one", "two", "three")},
        {"k": 96, "n": 33},
        {"k": 200, "n": 7},
        {"adapter_dtype": BF16},
    ],
    ids=["no-bias", "three-adapters", "n-33", "k-200", "bfloat16-adapter"],
)
def test_numbers_of_options(kind, options, feedforward):
    _, layer = ia3_model(kind, feedforward=feedforward, **options)
    k = options.get("k", 128)
    check_layer(layer, inputs(shape=(2, 3, k)))
    check_layer(layer, inputs(shape=(1, k)))


def test_compute_dtype_is_settled_as_by_peft():
    """Without one of its own, the 4-bit base layer of a declared model computes in float32, as PEFT asks."""
    torch.manual_seed(0)
    model = One(four_bit(nn.Linear(128, 48).to(BF16)))
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.IA3Config(target_modules=["proj"], feedforward_modules=[]))
    stock = no_repacking(copy.deepcopy(model))
    pk.replace_layers(model)
    agree(run(model, inputs()), run(stock, inputs()), BF16)
    layers = [m.base_model.model.proj.base_layer for m in (model, stock)]
    assert [layer.compute_dtype for layer in layers] == [F32, F32]


@FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, feedforward):
    model, layer, stock = replaced(kind, dtype=F32 if kind == "dense" else BF16, feedforward=feedforward)
    with torch.autocast("cpu", dtype=BF16):
        agree(run(model, inputs(F32)), run(stock, inputs(F32)), BF16)
        assert "scaled_linear" in pk.explain(layer, inputs(F32))


@FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_set_adapter_disable_and_delete(kind, feedforward):
    model, layer, stock = replaced(kind, adapters=("one", "two"), feedforward=feedforward)
    x = inputs()
    seen = []
    for names in (["one"], ["two"], ["one", "two"]):
        layer.set_adapter(names), stock.base_model.model.proj.set_adapter(names)
        agree(run(model, x), run(stock, x), BF16)
        seen.append(model(x))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    with model.disable_adapter(), stock.disable_adapter():
        close(model(x), stock(x), BF16)
        assert "left to PEFT: its adapters are disabled" in pk.explain(layer, x)
    for m in (model, stock):
        m.set_adapter("one")
        m.delete_adapter("two")
    agree(run(model, x), run(stock, x), BF16)


@FORMS
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe, feedforward):
    model, layer, stock = replaced("dense", dtype=F32, feedforward=feedforward)
    with torch.no_grad():
        for proj in (layer, stock.base_model.model.proj):
            proj.ia3_l["default"].abs_().add_(0.5)  # PEFT's unmerge divides
    x = inputs(F32)
    before = model(x)
    for m in (model, stock):
        quiet(m.merge_adapter, safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, stock.base_model.model.proj.base_layer.weight)
    close(model(x), before)
    assert "merged" in pk.explain(layer, x)
    quiet(model.unmerge_adapter)
    close(model(x), before)
    close(quiet(copy.deepcopy(model).merge_and_unload)(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, _, stock = replaced(kind)
    model.save_pretrained(tmp_path)
    fresh, _ = ia3_model(kind)
    fresh.load_adapter(tmp_path, "loaded")
    fresh.set_adapter("loaded")
    close(no_repacking(fresh)(inputs()), stock(inputs()), BF16)
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_restore_and_copies(kind):
    model, layer, stock = replaced(kind)
    twin, x = copy.deepcopy(model), inputs()
    assert torch.equal(twin(x), model(x))
    pk.restore_layers(model)
    assert type(layer) is type(stock.base_model.model.proj)
    assert torch.equal(no_repacking(model)(x), stock(x))


@pytest.mark.parametrize(("change", "reason"), [("base-hook", "hooks"), ("argument", "arguments besides x")])
def test_what_is_left_to_peft(change, reason):
    model, layer, stock = replaced("dense")
    x, options = inputs(), {}
    if change == "base-hook":
        calls = []
        layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
        close(model(x), stock(x), BF16)
        assert calls
    else:
        options = {"flag": 1}
    assert reason in pk.explain(layer, x, **options)


def test_conv1d_is_left_alone_with_the_reason():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=[], fan_in_fan_out=True)
    model = peft.get_peft_model(One(Conv1D(48, 128)), config)
    report = pk.replace_layers(model)
    assert "Conv1D, which has no kernel" in report.left[0].reason


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_whole_model(kind):
    """PEFT's default IA³ targets of a Llama: keys and values scale outputs, down projections inputs.

    In float32: in a bfloat16 model PEFT's 4-bit layers return keys in float32, which attention refuses beside queries.
    """
    base = tiny_llama_base(kind, F32)
    torch.manual_seed(1)
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    stock = no_repacking(copy.deepcopy(model))
    report = pk.replace_layers(model)
    assert len([e for e in report.replaced if e.op == "scaled_linear"]) == 6 and not report.left, str(report)
    results = []
    for m in (model, stock):
        loss = m(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        results.append([loss] + [p.grad for p in m.parameters() if p.requires_grad])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_lora_around_ia3(kind):
    """Both methods on one layer: PEFT nests the layers, the inner one is replaced, and the sum is that of both."""
    model, ia3 = ia3_model(kind, dtype=F32)
    host = model.base_model.model
    config = peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, host, adapter_name="default")
    lora = host.proj
    assert lora.base_layer is ia3
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("ia3_l" in name or "lora_" in name)
    stock = no_repacking(copy.deepcopy(host))
    report = pk.replace_layers(host)
    assert "which has no kernel" in report.left[0].reason and "scaled_linear" in pk.explain(ia3, inputs(F32))
    agree(run(host, inputs(F32)), run(stock, inputs(F32)), F32)
    base = ia3.base_layer
    weight = base.weight if kind == "dense" else pk.Weight4bit.from_bnb(base.weight)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    composed = pk.reference.ia3_linear(inputs(F32), weight, ia3.ia3_l["default"], bias=base.bias)
    composed = composed + lora.scaling["default"] * nn.functional.linear(nn.functional.linear(inputs(F32), a), b)
    close(host(inputs(F32)), composed)


@FORMS
def test_small_dense_layers_are_left_to_peft(monkeypatch, feedforward):
    """And only those: more rows, and a backend that is asked for by name, run the function."""
    monkeypatch.undo()
    from peft_kernels.integrations import hf_ia3

    rows, function = [], hf_ia3.ia3_linear
    monkeypatch.setattr(
        hf_ia3, "ia3_linear", lambda x, *args, **rest: rows.append(len(x)) or function(x, *args, **rest)
    )
    _, layer, stock = replaced("dense", feedforward=feedforward)
    rows.clear()  # the report asked with one row
    for m, backend, expected in ((5, "auto", []), (8192, "auto", [8192]), (5, "reference", [5])):
        x = inputs(shape=(m, 128))
        with pk.use_backend(backend):
            close(layer(x), stock.base_model.model.proj(x), BF16)
        assert rows == expected
        rows.clear()
    assert "not native: small beside dense" in pk.explain(layer, inputs())
    assert "small beside dense" not in pk.explain(layer, inputs(shape=(8192, 128)))
