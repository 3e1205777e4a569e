"""The tiled layout: reversible bit for bit, invisible in everything that leaves the package."""

import copy
import pickle

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.ops.nf4 import layout

SHAPES = {"one-tile": (1, 64), "primes": (7, 13 * 64), "smollm2-down": (576, 1536), "wide-blocks": (5, 512)}
UNTILED = {"straddling": (5, 96, 64), "half-tiles": (4, 64, 32), "odd": (7, 13, 64), "block-over-rows": (4, 64, 128)}
OP = "linear_4bit"


def quantized(n, k, *, nested=True, blocksize=64, quant_type="nf4"):
    torch.manual_seed(n * k)
    return pk.Weight4bit.quantize(torch.randn(n, k), double_quant=nested, blocksize=blocksize, quant_type=quant_type)


def codes(weight):
    return torch.stack([weight.packed >> 4, weight.packed & 0xF], dim=1).view(-1, 64)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_round_trip(shape, nested):
    weight = quantized(*shape, nested=nested, blocksize=256 if shape[1] == 512 else 64)
    tiled = weight.with_layout("tiled")
    assert tiled.layout == "tiled" and tiled.nbytes == weight.nbytes
    assert not torch.equal(tiled.packed, weight.packed)
    assert torch.equal(tiled.with_layout("bnb").packed, weight.packed)
    assert tiled.with_layout("tiled") is tiled and weight.with_layout("bnb") is weight
    for ours, theirs in zip(tiled.parts()[1:], weight.parts()[1:], strict=True):
        assert ours is theirs


def test_order():
    """The formula that kernels are written to."""
    weight = quantized(3, 128)
    source, tiled = codes(weight), weight.with_layout("tiled").packed.view(-1, 32)
    for t in range(4):
        for c in range(4):
            for e in range(2):
                byte = tiled[:, 8 * t + 2 * c + e]
                assert torch.equal(byte >> 4, source[:, 8 * c + 2 * t + e])
                assert torch.equal(byte & 0xF, source[:, 32 + 8 * c + 2 * t + e])


def test_large_weights_go_in_chunks(monkeypatch):
    packed = torch.randint(0, 256, (32 * 9,), dtype=torch.uint8)
    whole = layout.tile(packed)
    monkeypatch.setattr(layout, "_CHUNK", 64)
    assert torch.equal(layout.tile(packed), whole) and torch.equal(layout.untile(whole), packed)


@pytest.mark.parametrize("n, k, blocksize", UNTILED.values(), ids=UNTILED)
def test_rows_without_whole_tiles_stay(n, k, blocksize):
    weight = quantized(n, k, blocksize=blocksize)
    assert weight.with_layout("tiled") is weight


def test_unknown_layout():
    weight = quantized(2, 64)
    with pytest.raises(ValueError, match=r"layout: expected one of \('bnb', 'tiled'\), got 'marlin'"):
        weight.with_layout("marlin")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_same_values(backend, quant_type):
    weight = quantized(33, 192, quant_type=quant_type)
    tiled = weight.with_layout("tiled")
    assert torch.equal(tiled.dequantize(), weight.dequantize())
    x, dy = torch.randn(5, 192, requires_grad=True), torch.randn(5, 33)
    lora = torch.randn(4, 192), torch.randn(33, 4)
    results = []
    for w in (weight, tiled, tiled):  # the second call meets what the first has kept
        y = pk.functional.linear_4bit(x, w)
        z = pk.functional.lora_linear(x, w, *lora)
        results.append((y.detach(), z.detach(), *torch.autograd.grad((y, z), x, (dy, dy))))
    for ours in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours, results[0], strict=True))


def test_native_copy_ages_with_the_weight():
    if reason := dispatch.why_not("nf4", "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    tiled, other = quantized(8, 64).with_layout("tiled"), pk.Weight4bit.quantize(torch.randn(8, 64))
    with pk.use_backend("native"):
        before = tiled.dequantize()
        tiled.packed.copy_(other.with_layout("tiled").packed)
        after = tiled.dequantize()
        assert not torch.equal(before, after)
    with pk.use_backend("reference"):
        assert torch.equal(after, tiled.dequantize())


def test_copies_keep_the_layout():
    tiled = quantized(8, 64).with_layout("tiled")
    for again in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled)), tiled.to("cpu")):
        assert again.layout == "tiled" and torch.equal(again.packed, tiled.packed)
    assert "tiled" in repr(tiled)
    assert pk.Weight4bit.from_parts(tiled.parts(), tiled.meta()).layout == "tiled"


def test_state_dict_is_in_bitsandbytes_layout():
    weight = quantized(24, 128)
    plain, tiled = pk.nn.Linear4bit(weight), pk.nn.Linear4bit(weight.with_layout("tiled"))
    state = tiled.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    other = pk.nn.Linear4bit(quantized(24, 128, nested=False).with_layout("tiled"))
    other.load_state_dict(state)
    assert other.weight.layout == "tiled" and torch.equal(other.weight.packed, tiled.weight.packed)


def test_to_bnb():
    pytest.importorskip("bitsandbytes")
    weight = quantized(24, 128)
    assert torch.equal(weight.with_layout("tiled").to_bnb().data, weight.to_bnb().data)


def test_compile():
    tiled, x = quantized(24, 128).with_layout("tiled"), torch.randn(3, 128)
    compiled = torch.compile(pk.functional.linear_4bit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tiled), pk.functional.linear_4bit(x, tiled))
