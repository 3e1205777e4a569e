"""Linear4bit's state dict: what a checkpoint may hold, and that loading behaves as torch's modules do."""

import json

import pytest
import torch
from torch import nn

import peft_kernels as pk

BLOB = "weight.quant_state.bitsandbytes__nf4"


def layer(k=64, n=32, seed=0, **options):
    torch.manual_seed(seed)
    return pk.nn.Linear4bit.from_linear(nn.Linear(k, n), **options)


def edited(state, **changes):
    """The state with other facts in its JSON."""
    facts = json.loads(bytes(state[BLOB].tolist())) | changes
    return state | {BLOB: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def refused(target, state, match, **options):
    """Loading raises torch's own error, and the weight stays as it is."""
    linear = getattr(target, "base_layer", target)
    before, values = linear.weight, linear.weight.dequantize()
    with pytest.raises(RuntimeError, match=match):
        target.load_state_dict(state, **options)
    assert linear.weight is before and torch.equal(before.dequantize(), values)


def test_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = (nn.Sequential(layer(seed=s), layer(32, 64, seed=s + 1)) for s in (0, 2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
def test_another_shape(assign):
    refused(layer(), layer(64, 48).state_dict(), r"size mismatch for weight: .*\[48, 64\].*\[32, 64\]", assign=assign)


@pytest.mark.parametrize("shape", [[64, 32], [1, 2048]], ids=str)
def test_shape_edited(shape):
    refused(layer(), edited(layer().state_dict(), shape=shape), "size mismatch for weight")


def test_lora_linear():
    target, source = (pk.nn.LoRALinear(layer(64, n), r=4) for n in (32, 48))
    refused(target, source.state_dict(), "size mismatch for base_layer.weight")
    twin = pk.nn.LoRALinear(layer(seed=1), r=4)
    target.load_state_dict(twin.state_dict())
    assert torch.equal(target(torch.ones(2, 64)), twin(torch.ones(2, 64)))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize("strict", [True, False])
def test_part_missing(part, strict):
    state = layer(seed=1).state_dict()
    del state[f"weight.{part}"]
    refused(layer(), state, rf"weight: expected a complete quantization state.*weight\.{part}", strict=strict)


def test_weight_missing():
    target, state = layer(), layer(seed=1).state_dict()
    refused(target, {"bias": state["bias"]}, r"Missing key\(s\) in state_dict: \"weight\"")
    assert target.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys == ["weight"]


@pytest.mark.parametrize(
    "changes",
    [
        {"blocksize": 0},
        {"blocksize": 48},
        {"nested_blocksize": 0},
        {"dtype": "int8"},
        {"quant_type": "int4"},
        {"shape": [2048]},
        {"shape": [float("inf"), 64]},
        {"nested_offset": "none"},
    ],
    ids=str,
)
def test_damaged_facts(changes):
    refused(layer(), edited(layer(seed=1).state_dict(), **changes), "expected")


@pytest.mark.parametrize("part", ["nested_absmax", "nested_quant_map"])
def test_statistics_of_another_dtype(part):
    state = layer(seed=1).state_dict()
    refused(layer(), state | {f"weight.{part}": state[f"weight.{part}"].half()}, r"expected torch.float32")


def test_statistics_with_strides():
    target, source = layer(), layer(seed=1)
    state = {key: value.repeat_interleave(2, dim=0)[::2] for key, value in source.state_dict().items()}
    target.load_state_dict(state)
    assert torch.equal(target.weight.dequantize(), source.weight.dequantize())


class TestQuantMap:
    """The code book in a checkpoint is that of its type, or the weight cannot be decoded."""

    @pytest.mark.parametrize("change", ["reversed", "fp4", "short", "integer"])
    def test_another(self, change):
        state = layer(seed=1).state_dict()
        book = state["weight.quant_map"]
        fp4 = layer(quant_type="fp4").state_dict()["weight.quant_map"]
        books = {"reversed": book.flip(0), "fp4": fp4, "short": book[:15], "integer": book.to(torch.int8)}
        match = r"weight.quant_map: expected the 16 values of nf4"
        refused(layer(), state | {"weight.quant_map": books[change]}, match)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_that_of_bitsandbytes(self, quant_type, dtype):
        bnb = pytest.importorskip("bitsandbytes")
        source = bnb.nn.Linear4bit(64, 32, quant_type=quant_type).to("cpu")
        state = source.state_dict()
        state["weight.quant_map"] = state["weight.quant_map"].to(dtype)
        target = layer()
        target.load_state_dict(state)
        assert torch.equal(target.weight.packed, source.weight.data.view(-1))


def test_loading_copies():
    target, source = layer(), layer(seed=1)
    state = source.state_dict()
    target.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert torch.equal(target.weight.dequantize(), layer(seed=1).weight.dequantize())


def test_assigning_shares():
    target, state = layer(), layer(seed=1).state_dict()
    target.load_state_dict(state, assign=True)
    assert target.weight.packed.data_ptr() == state["weight"].data_ptr()


class TestMeta:
    """A layer on the meta device."""

    def test_assign(self):
        target, source = layer().to("meta"), layer(seed=1)
        target.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(3, 64)
        assert target.weight.device.type == "cpu" and torch.equal(target(x), source(x))

    def test_copy_is_a_no_op(self):
        target, source = layer().to("meta"), layer()
        target.bias = source.bias = None
        with pytest.warns(UserWarning, match="for weight: copying from .* no-op.*assign=True"):
            target.load_state_dict(source.state_dict())
        assert target.weight.device.type == "meta"

    def test_made_there(self):
        with torch.device("meta"), pk.use_backend("reference"):
            target = pk.nn.Linear4bit.from_linear(nn.Linear(64, 32))
        assert target.weight.device.type == "meta"
        target.load_state_dict(layer().state_dict(), assign=True)
        assert torch.equal(target.weight.dequantize(), layer().weight.dequantize())
