"""replace_layers and restore_layers: the report, the choice of layers, all or nothing, and back."""

import copy
import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from tiny import One, four_bit, lora_model, tiny_llama
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations import replace

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
hf_peft = pytest.importorskip("peft_kernels.integrations.hf_peft")

LORA = "peft.tuners.lora.layer.Linear"


def classes(model):
    return [type(module) for module in model.modules()]


def lora_layers(model):
    return {name: type(m) for name, m in model.named_modules() if hasattr(m, "lora_A")}


def test_report():
    model = tiny_llama("4bit")
    report = pk.replace_layers(model)
    assert report.counts == {"replaced": 14, "base": 14, "left": 0, "excluded": 0}
    assert {entry.name for entry in report.replaced} == set(lora_layers(model))
    entry = report.entries[0]
    assert entry.name == "base_model.model.model.layers.0.self_attn.q_proj"
    assert entry.old_class == "peft.tuners.lora.bnb.Linear4bit"
    assert entry.new_class == "peft_kernels.integrations.hf_peft_4bit.FusedLinear4bit"
    assert entry.op == "lora_linear" and entry.backend in ("native", "reference") and entry.reason is None
    base = report.entries[1]
    assert base.name == f"{entry.name}.base_layer" and base.status == "base" and base.op == "linear_4bit"
    assert dataclasses.asdict(entry)["backend"] == entry.backend


def test_printed_report_groups_like_layers():
    model = tiny_llama()
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.forward = lambda x: x
    text = str(pk.replace_layers(model))
    assert "13 layers replaced, 1 left alone" in text
    assert "base_model.model.model.layers.*.self_attn.q_proj (2 layers)" in text
    row = next(line for line in text.splitlines() if "layers.1.mlp.up_proj" in line)
    assert LORA in row and "left alone: its base layer's forward is replaced on the instance" in row
    assert max(len(line) for line in text.splitlines()[:10]) < 200 and "base_layer" not in text.split("left alone:")[0]


def test_report_says_why_the_reference_runs():
    with pk.use_backend("auto"):
        report = pk.replace_layers(lora_model("dense")[0])
    if report.replaced[0].backend == "reference":
        assert "not native:" in str(report) and report.replaced[0].passed_over


def test_report_of_a_model_without_such_layers():
    report = pk.replace_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert report.entries == () and "no Hugging Face PEFT adapter layer" in str(report)


def test_report_of_merged_layers():
    model, _ = lora_model("dense")
    model.merge_adapter()
    report = pk.replace_layers(model)
    assert "its adapters are merged" in report.replaced[0].reason and report.replaced[0].op is None
    assert "merged" in str(report)


def test_repr():
    assert repr(pk.replace_layers(One(nn.Linear(2, 2)))) == "ReplacementReport(replaced=0, base=0, left=0, excluded=0)"


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("q_proj", None, {"0.q", "1.q"}),
        ("layers.0.*", None, {"0.q", "0.v"}),
        (["layers.1.self_attn.q_proj", "v_proj"], None, {"1.q", "0.v", "1.v"}),
        (None, "*.layers.1.*", {"0.q", "0.v"}),
        ("layers.*", "q_proj", {"0.v", "1.v"}),
        (lambda name, module: module.out_features == 32, None, {"0.v", "1.v"}),
        (None, ["q_proj", lambda name, module: ".0." in name], {"1.v"}),
        ([], None, set()),
        (None, "nothing_of_that_name", {"0.q", "0.v", "1.q", "1.v"}),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_include_and_exclude(kind, include, exclude, expected):
    model = tiny_llama(kind, target_modules=["q_proj", "v_proj"])
    before = lora_layers(model)
    report = pk.replace_layers(model, include=include, exclude=exclude)
    changed = {name for name, cls in lora_layers(model).items() if cls is not before[name]}
    assert {f"{name.split('.')[4]}.{name[-6]}" for name in changed} == expected
    base_layers = [m.base_layer for n, m in model.named_modules() if n in before and n not in changed]
    assert all(type(base) in (nn.Linear, bnb.nn.Linear4bit) for base in base_layers)
    assert {entry.name for entry in report.entries if entry.reason == "excluded by the caller"} >= set(before) - changed


def test_misspelt_include():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"include: expected patterns that match a layer .*q_proj.*got 'qproj'"):
        pk.replace_layers(model, include=["q_proj", "qproj"])
    assert hf_peft.FusedLinear not in classes(model)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_bad_filter(argument):
    with pytest.raises(TypeError, match=f"{argument}: expected name patterns or callables"):
        pk.replace_layers(tiny_llama(), **{argument: [3]})


@pytest.mark.parametrize("function", [pk.replace_layers, pk.restore_layers])
def test_bad_model(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        function({})


def test_a_single_layer():
    _, layer = lora_model("4bit")
    report = pk.replace_layers(layer)
    assert [entry.status for entry in report.entries] == ["replaced", "base"]
    assert "(the model itself)" in str(report)


def test_plain_4bit_layers_beside_lora_layers():
    model = nn.Sequential(four_bit(nn.Linear(64, 64)), lora_model("4bit")[0])
    report = pk.replace_layers(model)
    assert [(e.name, e.status) for e in report.entries] == [
        ("0", "replaced"),
        ("1.base_model.model.proj", "replaced"),
        ("1.base_model.model.proj.base_layer", "base"),
    ]


@pytest.mark.parametrize("left_to_peft", [False, True])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_looking_for_the_kernel_changes_nothing(kind, left_to_peft):
    """No hook fires, no module or random number is used up; a call that is left to PEFT is not done."""
    model, layer = lora_model(kind, lora_dropout=0.5)
    calls = []
    for module in (model, layer, *([layer.base_layer] if left_to_peft else [])):
        module.register_forward_pre_hook(lambda *args: calls.append(args))
        module.register_forward_hook(lambda *args: calls.append(args))
    generator = torch.get_rng_state()
    entry = pk.replace_layers(model.train()).replaced[0]
    assert entry.op == (None if left_to_peft else "lora_linear")
    assert not left_to_peft or "left to PEFT: the base layer has hooks" in entry.reason
    assert calls == [] and torch.equal(torch.get_rng_state(), generator)


def test_looking_for_the_kernel_leaves_spectral_norm_alone():
    model, layer = lora_model("dense", dtype=torch.float32)
    nn.utils.spectral_norm(layer.base_layer)
    twin = copy.deepcopy(model)
    assert "hooks" in pk.replace_layers(model).replaced[0].reason
    assert torch.equal(layer.base_layer.weight_u, twin.base_model.model.proj.base_layer.weight_u)
    x = torch.randn(3, 128)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_parameters_on_the_meta_device(method, device):
    """The whole model, or with low_cpu_mem_usage its adapters: replaced, and served once they are materialized."""
    config = getattr(peft, method)(target_modules=["proj"], **({"feedforward_modules": []} if "IA3" in method else {}))
    base = One(nn.Linear(64, 32, device=device))
    model = peft.get_peft_model(base, config, low_cpu_mem_usage=device == "cpu")
    report = pk.replace_layers(model, strict=True)
    assert report.counts["replaced"] == 1 and report.replaced[0].op is None
    assert "meta device" in report.replaced[0].reason and "meta device" in str(report)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert pk.replace_layers(model).replaced[0].op is not None
    with pk.use_backend("reference"):
        stock, x = copy.deepcopy(model), torch.randn(3, 64)
        pk.restore_layers(stock)
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


class MyLora(peft.tuners.lora.layer.Linear):
    """A user's subclass: it may compute anything."""


class MyLinear(nn.Linear):
    """A user's linear layer."""


def _my_lora():
    model, layer = lora_model("dense")
    layer.__class__ = MyLora
    return model


def _my_linear():
    model, layer = lora_model("dense")
    layer.base_layer.__class__ = MyLinear
    return model


def _accelerate_hook(inner):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, layer = lora_model("dense")
    add_hook_to_module(layer.base_layer if inner else layer, ModelHook())
    return model


def _loha():
    config = peft.LoHaConfig(target_modules=["proj"])
    return peft.get_peft_model(One(nn.Linear(8, 8)), config)


LEFT_ALONE = {
    "subclass": (_my_lora, "a subclass of peft.tuners.lora.layer.Linear"),
    "base-subclass": (_my_linear, "its base layer is of class .*MyLinear"),
    "accelerate": (lambda: _accelerate_hook(False), r"its forward is replaced on the instance \(accelerate's hook\)"),
    "accelerate-base": (lambda: _accelerate_hook(True), r"its base layer's forward .*accelerate"),
    "other-method": (_loha, "there is no kernel for this class"),
    "dora": (lambda: lora_model("dense", use_dora=True)[0], "a Dora variant of LoRA"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    make, reason = LEFT_ALONE[case]
    model = make()
    before = classes(model)
    report = pk.replace_layers(model)
    assert len(report.left) == 1 and not report.replaced
    assert re.search(reason, report.left[0].reason), report.left[0].reason
    assert report.left[0].new_class is None and classes(model) == before
    with pytest.raises(RuntimeError, match=f"strict: 1 layers must be left alone(.|\n)*{reason}"):
        pk.replace_layers(model, strict=True)


def test_strict_ignores_what_is_excluded():
    model = nn.Sequential(_my_lora(), lora_model("dense")[0])
    with pytest.raises(RuntimeError, match=r"0.base_model.model.proj \(.*MyLora\)"):
        pk.replace_layers(model, strict=True)
    assert hf_peft.FusedLinear not in classes(model)
    assert pk.replace_layers(model, strict=True, exclude="0.*").counts["replaced"] == 1


@pytest.mark.parametrize("step", ["why_not", "_prepare", "forward"])
def test_all_or_nothing(step, monkeypatch):
    """The third layer's check, swap or first look at its kernel fails: the model is as it was, the error names it."""
    model = tiny_llama()
    before, attributes = classes(model), [set(m.__dict__) for m in model.modules()]
    calls = []
    original = getattr(hf_peft.FusedLinear, step)

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("broken")
        return original(*args)

    monkeypatch.setattr(hf_peft.FusedLinear, step, fail if step == "forward" else staticmethod(fail))
    with pytest.raises(RuntimeError, match=r"layer '.*layers.0.self_attn.v_proj' .* KeyError.*exclude=") as raised:
        pk.replace_layers(model)
    assert isinstance(raised.value.__cause__, KeyError)
    assert classes(model) == before and [set(m.__dict__) for m in model.modules()] == attributes
    monkeypatch.undo()
    assert pk.replace_layers(model).counts["replaced"] == 14


@pytest.mark.parametrize("kind", ["dense", "undeclared-4bit", "4bit"])
def test_idempotent(kind):
    model = tiny_llama(kind)
    first = pk.replace_layers(model)
    now = classes(model)
    assert pk.replace_layers(model) == first
    assert classes(model) == now
    assert pk.replace_layers(model, strict=True) == first


def test_replaces_what_was_added_since():
    model = tiny_llama(target_modules=["q_proj"])
    assert pk.replace_layers(model).counts["replaced"] == 2
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert pk.replace_layers(model).counts["replaced"] == 4


@pytest.mark.parametrize("kind", ["dense", "undeclared-4bit", "4bit"])
def test_restore(kind):
    model = tiny_llama(kind).train()
    before, attributes = classes(model), [set(m.__dict__) for m in model.modules()]
    twin = copy.deepcopy(model)
    pk.replace_layers(model)
    model(torch.arange(5)[None])
    assert classes(model) != before
    pk.restore_layers(model)
    assert classes(model) == before
    assert [set(m.__dict__) for m in model.modules()] == attributes
    pk.restore_layers(model)
    assert torch.equal(model(torch.arange(5)[None]).logits, twin(torch.arange(5)[None]).logits)


@pytest.mark.parametrize("name", replace.REGISTRY)
def test_registry_names_real_classes(name):
    module, _, cls = name.rpartition(".")
    old = getattr(pytest.importorskip(module), cls)
    fused = replace._fused_class(object.__new__(old))
    assert fused.__bases__[-1] is old and fused.why_not and fused._prepare


def test_imports_only_what_the_model_uses():
    code = """
import sys, torch, peft_kernels as pk
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
pk.replace_layers(model); pk.restore_layers(model)
assert not {'peft', 'bitsandbytes', 'transformers'} & set(sys.modules), 'imported'
"""
    subprocess.run([sys.executable, "-c", code], check=True)
