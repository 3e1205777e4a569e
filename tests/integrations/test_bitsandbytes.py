"""bitsandbytes' Linear4bit: the same numbers while replaced, and none of its defects on the CPU."""

import copy
import io
import logging

import pytest
import torch
from tiny import check_layer, four_bit, oracle, run
from torch import nn

import peft_kernels as pk

bnb = pytest.importorskip("bitsandbytes")

OP = "linear_4bit"
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


def bare(k=128, n=48, dtype=BF16, bias=True, **options):
    torch.manual_seed(k + n)
    return four_bit(nn.Linear(k, n, bias=bias).to(dtype), **{"compute_dtype": dtype, **options})


def replaced(*args, **options):
    layer = bare(*args, **options)
    report = pk.replace_layers(layer)
    assert report.counts["replaced"] == 1, str(report)
    return layer


def inputs(dtype=BF16, shape=(5, 128)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def repacks():
    """Whether bitsandbytes repacks weights on this machine."""
    from bitsandbytes.nn import modules

    return hasattr(modules, "has_avx512bf16") and modules.has_avx512bf16()


@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "options",
    [{}, {"quant_type": "fp4"}, {"compress_statistics": False}, {"bias": False}, {"quant_storage": BF16}],
    ids=["nested", "fp4", "plain-absmax", "no-bias", "bfloat16-storage"],
)
def test_numbers(backend, dtype, options):
    check_layer(bare(dtype=dtype, **options), inputs(dtype))


@pytest.mark.parametrize("cls", ["LinearNF4", "LinearFP4"])
def test_named_classes(cls):
    layer = getattr(bnb.nn, cls)(128, 48, compute_dtype=F32).to("cpu")
    check_layer(layer, inputs(F32))
    assert type(layer).__name__ == cls and isinstance(layer, getattr(bnb.nn, cls))
    pk.restore_layers(layer)
    assert type(layer) is getattr(bnb.nn, cls)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=["x-float32", "x-bfloat16", "x-float16"])
@pytest.mark.parametrize("compute", [None, F32, BF16], ids=["unset", "float32", "bfloat16"])
def test_compute_dtype(x_dtype, compute):
    layer = bare(compute_dtype=compute, bias=False)
    stock = copy.deepcopy(layer)
    ours, _ = check_layer(layer, inputs(x_dtype))
    stock(inputs(x_dtype))
    assert ours["y"].dtype == x_dtype
    assert (layer.compute_dtype, layer.compute_type_is_set) == (stock.compute_dtype, stock.compute_type_is_set)


def test_explaining_does_not_settle_the_compute_dtype():
    layer = replaced(compute_dtype=None)
    assert "linear_4bit" in pk.explain(layer, inputs(F32))
    assert not layer.compute_type_is_set and layer.compute_dtype is None


@pytest.mark.parametrize("autocast", [BF16, F16], ids=["same", "another"])
def test_autocast_does_not_change_the_compute_dtype(autocast):
    layer = bare()
    stock = copy.deepcopy(layer)
    pk.replace_layers(layer)
    with torch.autocast("cpu", dtype=autocast):
        ours, theirs = layer(inputs(F32)), stock(inputs(F32))
    assert ours.dtype == theirs.dtype == F32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_view_is_kept_and_shares_memory():
    layer = replaced()
    layer(inputs())
    view = layer._weight_view
    layer(inputs())
    assert layer._weight_view is view
    assert view.weight.packed.data_ptr() == layer.weight.data.data_ptr()


@pytest.mark.parametrize("change", ["parameter", "data", "state", "load_state_dict"])
def test_view_follows_the_weight(change):
    layer, other = replaced(), four_bit(nn.Linear(128, 48).to(BF16), BF16)
    layer(inputs())
    if change == "parameter":
        layer.weight = other.weight
    elif change == "data":
        layer.weight.data, layer.weight.quant_state.absmax = other.weight.data, other.weight.quant_state.absmax
        layer.weight.quant_state.state2, layer.weight.quant_state.offset = (
            other.weight.quant_state.state2,
            other.weight.quant_state.offset,
        )
    elif change == "state":
        layer.weight.data, layer.weight.quant_state = other.weight.data, other.weight.quant_state
    else:
        layer.weight.data.copy_(other.weight.data)  # what load_state_dict does to a parameter: in place
        layer.weight.quant_state = other.weight.quant_state
    layer.bias = other.bias
    expected = pk.functional.linear_4bit(inputs(), pk.Weight4bit.from_bnb(other.weight), other.bias)
    assert torch.equal(layer(inputs()), expected)


@pytest.mark.parametrize("field", ["offset", "state2"])
def test_view_follows_second_statistics(field):
    layer, other = replaced(), four_bit(nn.Linear(128, 48).to(BF16), BF16)
    before = layer(inputs())
    setattr(layer.weight.quant_state, field, getattr(other.weight.quant_state, field))
    after = layer(inputs())
    assert torch.equal(after, pk.functional.linear_4bit(inputs(), pk.Weight4bit.from_bnb(layer.weight), layer.bias))
    assert not torch.equal(after, before)


def test_replaced_layers_share_no_code_book():
    """As safetensors demands of a checkpoint, also of weights that we have unpacked."""
    layers = [bare(), bare()]
    for layer in layers:
        layer.weight.quant_state = pk.Weight4bit.from_bnb(layer.weight).to_bnb().quant_state
    first, second = (layer.state_dict()["weight.quant_map"] for layer in layers)
    assert first.data_ptr() != second.data_ptr()


def test_moving_keeps_working():
    layer = replaced()
    y = layer(inputs())
    assert torch.equal(layer.to("cpu").to(BF16)(inputs()), y)
    assert type(layer.weight).__name__ == "Params4bit" and type(layer).__name__ == "Linear4bit"


def test_copies_and_pickles():
    layer = replaced()
    y = layer(inputs())
    twin = copy.deepcopy(layer)
    assert twin._weight_view is None and torch.equal(twin(inputs()), y)
    twin.weight.data.zero_()
    assert torch.equal(layer(inputs()), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert "linear_4bit" in pk.explain(loaded, inputs()) and torch.equal(loaded(inputs()), y)


def test_state_dict_is_that_of_bitsandbytes():
    layer = bare()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    pk.replace_layers(layer)
    run(layer, inputs())
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_not_quantized_yet():
    layer = bnb.nn.Linear4bit(64, 32)
    report = pk.replace_layers(layer)
    assert type(layer) is bnb.nn.Linear4bit
    assert "not quantized yet" in report.left[0].reason


def test_weight_of_transposed_orientation_is_left_to_bitsandbytes():
    pytest.importorskip("bitsandbytes", minversion="0.50", reason="bitsandbytes did not take such weights before 0.50")
    layer = replaced()
    layer.weight.quant_state.shape = torch.Size((128, 48))
    layer._weight_view = None
    assert "quantized with shape (128, 48)" in pk.explain(layer, inputs())
    with pytest.warns(DeprecationWarning, match=r"\[K, N\]"):
        assert layer.eval()(inputs()).shape == (5, 48)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_peer_defect_no_gradient_after_eval():
    layer = replaced(n=64)
    layer.eval()(inputs())
    x = inputs().requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(("k", "n"), [(128, 33), (96, 64), (100, 7)])
def test_peer_defect_eval_crashes_on_odd_shapes(k, n):
    layer = replaced(k, n)
    x = inputs(shape=(3, k))
    with torch.no_grad():
        y = layer.eval()(x)
    assert torch.equal(y, layer.train()(x)) and y.shape == (3, n)


def test_peer_defect_rows_that_blocks_straddle():
    """bitsandbytes' AVX-512 code decodes K % blocksize != 0 with the scales of other blocks."""
    layer = replaced(96, 64, dtype=F32)
    original = nn.Linear(96, 64)
    layer.weight = four_bit(original, F32).weight
    decoded = layer(torch.eye(96)) - layer.bias
    step = 0.16 * original.weight.abs().max()  # half the widest gap between two NF4 values
    assert (decoded.t() - original.weight).abs().max() <= step


def test_peer_defect_saved_statistics_change_after_eval():
    layer = replaced(n=64)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(inputs())
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_peer_defect_bias_cast_in_place():
    """A float32 bias that is trained (BitFit) stays float32, and its gradient too."""
    layer = bare()
    layer.bias = nn.Parameter(layer.bias.float())
    pk.replace_layers(layer)
    bias = layer.bias
    layer(inputs()).sum().backward()
    assert layer.bias is bias and bias.dtype == F32 and bias.grad.dtype == F32


@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=["uint8", "bfloat16-storage"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_repacked_weight_is_brought_back(storage, nested):
    """A layer that bitsandbytes has run in eval mode already."""
    if not repacks():
        pytest.skip("bitsandbytes repacks only with AVX512-BF16")
    layer = bare(n=64, compress_statistics=nested, quant_storage=storage)
    original = pk.Weight4bit.from_bnb(layer.weight).dequantize(F32)
    shape, dtype = layer.weight.shape, layer.weight.quant_state.dtype
    with torch.no_grad():
        layer.eval()(inputs())
    assert layer.weight.quant_state.packing_format_for_cpu
    report = pk.replace_layers(layer.train())
    assert report.counts["replaced"] == 1 and not report.left
    results = run(layer, inputs())
    expected = oracle(layer, inputs(), torch.ones(5, 64))
    for name, value in results.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-2, atol=2e-2)
    state = layer.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False) and state.dtype == dtype
    assert layer.weight.shape == shape and layer.weight.dtype == storage and layer.quant_state is state
    decoded = pk.Weight4bit.from_bnb(layer.weight).dequantize(F32)
    torch.testing.assert_close(decoded, original, rtol=2**-8, atol=0)  # what bfloat16 scales have left
    loaded = bnb.nn.Params4bit.from_prequantized(layer.weight.data, _statistics(layer), device="cpu")
    assert torch.equal(pk.Weight4bit.from_bnb(loaded).dequantize(F32), decoded)
    pk.restore_layers(layer)
    run(layer.train(), inputs())


def _statistics(layer):
    state = layer.state_dict()
    return {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}


def test_replacing_a_repacked_weight_is_undone_if_it_fails(monkeypatch):
    if not repacks():
        pytest.skip("bitsandbytes repacks only with AVX512-BF16")
    layer = bare(n=64)
    with torch.no_grad():
        before = layer.eval()(inputs())
    monkeypatch.setattr("peft_kernels.dispatch.record", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pk.replace_layers(layer)
    assert type(layer) is bnb.nn.Linear4bit and layer.weight.quant_state.packing_format_for_cpu
    with torch.no_grad():
        assert torch.equal(layer(inputs()), before)


def test_no_warning_about_the_compute_dtype_is_lost(caplog):
    layer = replaced(compute_dtype=None)
    with caplog.at_level(logging.WARNING):
        layer(inputs(F16))
    assert layer.compute_type_is_set and layer.compute_dtype is None
