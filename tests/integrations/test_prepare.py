"""prepare_bitfit and prepare_scale_bias: what is trained, and the same numbers with kernels and without."""

import copy

import pytest
import torch
from tiny import close, four_bit, no_repacking, tiny_llama_base, tokens
from torch import nn

import peft_kernels as pk
from peft_kernels import native
from peft_kernels.testing import assert_within_budget

BF16, F32 = torch.bfloat16, torch.float32
OP = "scaled_linear"
METHODS = {"bitfit": pk.prepare_bitfit, "scale-bias": pk.prepare_scale_bias}
KINDS = ("dense", "bitsandbytes", "Linear4bit")


@pytest.fixture(autouse=True)
def kernels_for_small_layers(monkeypatch):
    """Else `auto` would leave the dense layers of these sizes to the plain layer's forward."""
    monkeypatch.setattr("peft_kernels.ops.scaled_linear.vendor._SMALL", 0)


def block(kind, dtype=F32, bias=True):
    """Two linear layers around a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128, bias=bias), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 32, bias=bias)
    ).to(dtype)
    for i in (0, 3):
        if kind == "bitsandbytes":
            pytest.importorskip("bitsandbytes")
            model[i] = four_bit(model[i], dtype)
        elif kind == "Linear4bit":
            model[i] = pk.nn.Linear4bit.from_linear(model[i])
    return no_repacking(model)


def spread(model):
    """Random values for what is trained, so that every gradient counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def run(model, x):
    """y and the gradients of all that is trained, and of x."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_prepared_replaced_and_restored(backend, method, kind, dtype):
    model = block(kind, dtype)
    keys = set(model.state_dict())
    report = METHODS[method](model)
    biases, scales = {"0.bias", "1.bias", "3.bias"}, {"0.scale", "3.scale"}
    expected = biases if method == "bitfit" else biases | scales | {"1.weight"}
    assert set(report.trained) == expected and report.layers == ("0", "3") and not report.left
    assert set(model.state_dict()) == keys | (expected & scales)
    spread(model)
    x = torch.randn(5, 64).to(dtype)
    plain = run(model, x)
    assert set(plain) == {"y", "x"} | expected
    classes = [type(m) for m in model]
    swapped = pk.replace_layers(model)
    ours = 0 if (method, kind) == ("bitfit", "Linear4bit") else 2  # that layer trains its bias as it is
    assert len(swapped.replaced) == ours and not swapped.left, str(swapped)
    assert all(entry.op == "scaled_linear" and entry.backend == backend for entry in swapped.replaced)
    fused = run(model, x)
    for name in plain:
        assert fused[name].dtype == plain[name].dtype
        close(fused[name], plain[name], dtype)
    pk.restore_layers(model)
    assert [type(m) for m in model] == classes
    assert torch.equal(run(model, x)["y"], plain["y"])


@pytest.mark.parametrize(
    ("method", "m", "row"),
    [
        ("bitfit", 5, "bias of dense"),
        ("bitfit", 4096, "bias of dense"),
        ("scale-bias", 5, "small beside dense"),
        ("scale-bias", 4096, None),
    ],
)
def test_what_torch_does_as_well_is_left_to_torch(monkeypatch, caplog, method, m, row):
    """By the plain layer's own forward, bit for bit, and without a warning; explain and the report say why."""
    monkeypatch.undo()
    from peft_kernels.integrations import trained_layers

    monkeypatch.setattr(native, "multiplies", lambda dtype: True)  # without bfloat16 torch does not do as well
    calls = []
    for cls in (trained_layers.FusedTrained, trained_layers.FusedBitFitLinear):
        right = cls._linear
        monkeypatch.setattr(cls, "_linear", lambda self, *a, right=right: calls.append(a) or right(self, *a))
    model, x = block("dense", BF16), torch.randn(m, 64).to(BF16)
    METHODS[method](model)
    spread(model)
    plain = run(model, x)
    report = pk.replace_layers(model)
    assert len(report.replaced) == 2
    calls.clear()
    fused = run(model, x)
    if row is None:
        assert len(calls) == 1  # the first layer; the second is small
        close(fused["y"], plain["y"], BF16)
        assert "not native: small" not in pk.explain(model[0], x)
        return
    assert not calls and all(torch.equal(fused[name], plain[name]) for name in plain)
    assert f"not native: {row}" in pk.explain(model[0], x) and f"not native: {row}" in str(report)
    assert all(entry.backend == "reference" for entry in report.replaced)
    assert not any("slow" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_model_was(method, kind):
    model = block(kind, bias=False)
    x = torch.randn(5, 64)
    before = model(x)
    options = {"add_missing": True} if method == "bitfit" else {}
    report = METHODS[method](model, **options)
    close(model(x), before)
    assert {"0.bias", "3.bias"} <= set(report.trained)
    pk.replace_layers(model)
    close(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_peer_defect_bias_is_cast_in_place(method):
    """bitsandbytes casts a float32 bias to bfloat16 at the first forward, under the optimizer that trains it."""
    stock = block("bitsandbytes", BF16)
    stock[0].bias.data = stock[0].bias.data.float()
    model, x = copy.deepcopy(stock), torch.randn(5, 64).bfloat16()
    stock(x)
    assert stock[0].bias.dtype == BF16, "bitsandbytes no longer does so: drop this test"
    METHODS[method](model)
    for _ in range(2):
        bias = model[0].bias
        model(x).sum().backward()
        assert model[0].bias is bias and bias.dtype == bias.grad.dtype == F32
        pk.replace_layers(model)


@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_4bit_layer(method, replaced):
    """The bias must never be taken out of the layer, not even for the length of a call."""
    model = block("bitsandbytes")
    METHODS[method](model)
    layer, x = spread(model)[0], torch.randn(5, 64)
    if replaced:
        pk.replace_layers(model)
    expected, bias = layer(x).detach(), layer.bias
    inside = []
    layer.register_forward_hook(lambda *_: inside.append(layer.bias is bias))
    forward = torch.nn.functional.linear

    def watched(*args, **kwargs):  # what bitsandbytes calls in the middle of its forward
        inside.append(layer.bias is bias)
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        close(layer(x), expected)
    assert all(inside) and len(inside) == (1 if replaced else 2)


@pytest.mark.parametrize("kind", ["dense", "Linear4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_export_for_any_number_of_rows(method, kind, monkeypatch):
    monkeypatch.undo()  # the heuristics as they are
    model = block(kind)
    METHODS[method](model)
    spread(model).requires_grad_(False).eval()
    pk.replace_layers(model)
    x = torch.randn(6, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
        for rows in (1, 6, 40):
            x = torch.randn(rows, 64)
            close(program(x), model(x))


def test_conv1d_is_reported():
    """GPT-2's linear layers hold their weight the other way round; their biases are trained like any others."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(8, 4), nn.Linear(8, 4))
    report = pk.prepare_scale_bias(model)
    assert set(report.trained) == {"1.scale", "1.bias"} and report.layers == ("1",)
    assert [name for name, _ in report.left] == ["0"] and "left alone: 0: a Conv1D" in str(report)
    assert pk.prepare_scale_bias(model, exclude="0").left == ()
    assert set(pk.prepare_bitfit(model).trained) == {"0.bias", "1.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_only_what_is_trained(kind):
    model = block(kind)
    report = pk.prepare_scale_bias(model)
    pk.replace_layers(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(9, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(report.trained)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts(kind, tmp_path):
    """A prepared model loads the base model's state; its own goes through a file and back."""
    state = block(kind).state_dict()
    model = block(kind)
    pk.prepare_scale_bias(model)
    stock = kind == "bitsandbytes"  # whose layers do not take their own quantization statistics back
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["0.scale", "3.scale"] and (stock or not unexpected)
    spread(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = block(kind)
    pk.prepare_scale_bias(other)
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=not stock)
    pk.replace_layers(model)
    x = torch.randn(5, 64)
    close(other(x), model(x))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and type(twin[0]) is type(model[0])


def test_counts():
    model = block("Linear4bit")
    total = 64 * 128 + 128 + 128 * 2 + 128 * 32 + 32
    report = pk.prepare_bitfit(model)
    assert (report.trainable, report.total) == (128 + 128 + 32, total)
    assert str(report).startswith("288 of 12,704 parameters are trained (2.267 %)")
    pytest.importorskip("bitsandbytes")
    assert pk.prepare_bitfit(block("bitsandbytes")).total == total


def test_selection():
    model = block("dense")
    assert pk.prepare_bitfit(model, include="0").trained == ("0.bias",)
    assert pk.prepare_bitfit(model, exclude=["3", lambda name, module: isinstance(module, nn.LayerNorm)]).trained == (
        "0.bias",
    )
    report = pk.prepare_scale_bias(model, include="3", train_norms=False, also_train="1")
    assert set(report.trained) == {"3.scale", "3.bias", "1.weight", "1.bias"} and report.layers == ("3",)
    with pytest.raises(ValueError, match="include: expected patterns that match a layer .*got 'q_proj'"):
        pk.prepare_bitfit(model, include="q_proj")
    with pytest.raises(ValueError, match="also_train: expected patterns"):
        pk.prepare_bitfit(model, also_train="classifier")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        pk.prepare_scale_bias(3)


def test_a_scale_that_was_trained_is_kept():
    model = block("dense")
    pk.prepare_scale_bias(model)
    spread(model)
    pk.replace_layers(model)
    x = torch.randn(5, 64)
    before = model(x)
    assert set(pk.prepare_bitfit(model).trained) == {"0.bias", "1.bias", "3.bias"}
    close(model(x), before)
    pk.prepare_scale_bias(model)
    close(model(x), before)


def test_what_cannot_be_prepared_is_reported():
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(MyLinear(8, 8), nn.Linear(8, 8))
    model[1].forward = lambda x, forward=model[1].forward: forward(x)
    report = pk.prepare_scale_bias(model)
    assert [name for name, _ in report.left] == ["0", "1"]
    assert "MyLinear" in report.left[0][1] and "forward is replaced" in report.left[1][1]
    assert "left alone: 0: a subclass" in str(report) and not report.trained


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_model(method, kind):
    """A transformers model: the output embedding stays as it is, the norms are trained, the loss is the plain one's."""
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
    model = no_repacking(tiny_llama_base(kind))
    x = {"input_ids": tokens(), "labels": tokens()}
    before = model(**x).loss
    options = {"add_missing": True, "exclude": "lm_head"} if method == "bitfit" else {}
    report = METHODS[method](model, **options)
    assert len(report.layers) == 14 and not any("lm_head" in name for name in report.trained)
    assert ("model.norm.weight" in report.trained) == (method == "scale-bias")
    close(model(**x).loss, before)
    spread(model)
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**x).loss
        loss.backward()
        trained = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        losses.append(
            [loss, torch.cat(trained)]
        )  # together: some gradients are zero but for rounding, as of key biases
        assert not pk.replace_layers(model).left
    for ours, theirs in zip(*reversed(losses), strict=True):
        close(ours, theirs)


class TestModules:
    """pk.nn.IA3Linear, BitFitLinear, ScaleBiasLinear."""

    def base(self, quantized):
        torch.manual_seed(0)
        linear = nn.Linear(128, 32)
        return pk.nn.Linear4bit.from_linear(linear) if quantized else linear

    @pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
    def test_ia3_names_are_those_of_peft(self, feedforward):
        peft = pytest.importorskip("peft")
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
        wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(128, 32)), config)
        theirs = {name.split(".0.")[-1]: t.shape for name, t in wrapped.state_dict().items()}
        ours = pk.nn.IA3Linear.from_linear(nn.Linear(128, 32), is_feedforward=feedforward)
        assert {name: t.shape for name, t in ours.state_dict().items()} == theirs

    @pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
    def test_ia3_merge_is_undone_exactly(self, backend, feedforward):
        layer, x = pk.nn.IA3Linear(self.base(False), is_feedforward=feedforward), torch.randn(3, 128)
        layer.add_adapter("second")
        layer.set_adapter(["default", "second"])
        with torch.no_grad():
            for vector in layer.ia3_l.values():
                vector.copy_(torch.randn_like(vector))
            layer.ia3_l["default"].view(-1)[::2] = 0
        weight, bias, y = layer.base_layer.weight.clone(), layer.base_layer.bias.clone(), layer(x)
        layer.merge()
        layer.merge()
        assert layer.merged_adapters == ["default", "second"]
        close(layer(x), y)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight) and torch.equal(layer.base_layer.bias, bias)
        assert torch.equal(layer(x), y)

    @pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
    def test_ia3_trains_its_vectors(self, backend, quantized):
        layer = pk.nn.IA3Linear(self.base(quantized))
        x = torch.randn(3, 128)
        close(layer(x), layer.base_layer(x))
        layer(x).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"ia3_l.default"}

    @pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
    @pytest.mark.parametrize("cls", [pk.nn.BitFitLinear, pk.nn.ScaleBiasLinear])
    def test_state_and_moves(self, backend, cls, quantized):
        base, x = self.base(quantized), torch.randn(3, 128)
        layer, other = cls(base.weight, base.bias), cls(self.base(quantized).weight)
        assert set(layer.state_dict()) - set(base.state_dict()) == (
            {"scale"} if cls is pk.nn.ScaleBiasLinear else set()
        )
        close(layer(x), base(x))
        other.load_state_dict(spread(layer).state_dict())
        assert torch.equal(other(x), layer(x))
        layer(x).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
            name for name, p in layer.named_parameters() if name != "weight"
        }
        assert layer.to(BF16)(x.to(BF16)).dtype == BF16
        assert (layer.in_features, layer.out_features) == (128, 32)

    def test_from_bnb(self):
        pytest.importorskip("bitsandbytes")
        layer, x = four_bit(nn.Linear(128, 32)), torch.randn(3, 128)
        for make in (pk.nn.IA3Linear, pk.nn.BitFitLinear, pk.nn.ScaleBiasLinear):
            ours = make.from_bnb(layer)
            assert_within_budget(ours(x), pk.nn.Linear4bit.from_bnb(layer)(x).double(), layer(x))

    def test_errors(self):
        layer = pk.nn.IA3Linear(self.base(True))
        with pytest.raises(ValueError, match=r"base_layer: expected a dense weight to merge into, got Weight4bit"):
            layer.merge()
        with pytest.raises(ValueError, match=r"names: expected adapters of \['default'\], got 'other'"):
            layer.set_adapter("other")
        with pytest.raises(ValueError, match="name: expected a new adapter name"):
            layer.add_adapter("default")
        with pytest.raises(TypeError, match=r"base_layer: expected nn.Linear or Linear4bit, got ReLU"):
            pk.nn.IA3Linear(nn.ReLU())
