"""The codec and Weight4bit: bit for bit what bitsandbytes makes and reads, on every backend that runs here."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.ops.nf4.reference import CODES, dynamic_map

OP = "nf4"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"one": (1, 1), "odd": (7, 13), "partial-block": (33, 100), "straddling": (5, 96), "square": (64, 64)}
CPU = torch.device("cpu")


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def weight(shape, dtype, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(shape).to(dtype)
    w.view(-1)[: min(64, w.numel() // 2)] = 0
    return w


def by_blocks(bnb, packed, state, ours):
    """bitsandbytes' own decode, one block at a time.

    On whole matrices with K % blocksize != 0 its AVX-512 path (0.50.2) gives rows the scales of other blocks.
    """
    scale = state.absmax
    if state.nested:
        scale = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    n, size, flat = ours.shape[0] * ours.shape[1], ours.blocksize, packed.reshape(-1)
    blocks = []
    for i, start in enumerate(range(0, n, size)):
        codes = flat[start // 2 : (start + size) // 2]
        options = {"absmax": scale[i : i + 1], "blocksize": size, "quant_type": ours.quant_type}
        state_of_block = bnb.functional.QuantState(shape=(1, 2 * len(codes)), dtype=ours.dtype, **options)
        blocks.append(bnb.functional.dequantize_4bit(codes.view(-1, 1), state_of_block).view(-1))
    return torch.cat(blocks)[:n]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_equal_bitsandbytes(bnb, quant_type):
    assert torch.equal(torch.tensor(CODES[quant_type]), bnb.functional.get_4bit_type(quant_type, "cpu"))
    assert torch.equal(dynamic_map(CPU), bnb.functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantize_equals_bitsandbytes(bnb, backend, shape, quant_type, blocksize, dtype):
    w = weight(shape, dtype)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    ours = pk.functional.quantize_4bit(w, quant_type=quant_type, blocksize=blocksize)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dequantize_equals_bitsandbytes(bnb, backend, shape, nested, dtype):
    w = weight(shape, dtype)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    ours = pk.Weight4bit.from_bnb((packed, state))
    assert ours.packed.data_ptr() == packed.data_ptr()
    assert torch.equal(pk.functional.dequantize_4bit(ours), by_blocks(bnb, packed, state, ours).view(shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_to_bnb_is_faithful(bnb, backend, shape):
    ours = pk.Weight4bit.quantize(weight(shape, torch.bfloat16))
    params = ours.to_bnb()
    assert params.data_ptr() == ours.packed.data_ptr()
    theirs = by_blocks(bnb, params.data, params.quant_state, ours)
    assert torch.equal(theirs.view(shape), ours.dequantize())
    again = pk.Weight4bit.from_bnb(params)
    assert all(torch.equal(a, b) for a, b in zip(again.parts(), ours.parts(), strict=True))
    assert again.meta() == ours.meta()


def test_nested_codes_are_the_nearest(backend):
    absmax = torch.rand(1000) + 0.5
    w = pk.Weight4bit.quantize(torch.randn(250, 256) * absmax.repeat_interleave(64).view(250, 256))
    plain = pk.Weight4bit.quantize(w.dequantize(torch.float32), double_quant=False)
    assert w.nested is not None and plain.absmax.shape == w.absmax.shape
    raw = pk.functional.quantize_4bit(torch.randn(250, 256))
    nested = pk.Weight4bit.quantize(raw.dequantize())
    with pk.use_backend("reference"):
        assert torch.equal(pk.Weight4bit.quantize(raw.dequantize()).absmax, nested.absmax)
    scaled = (raw.absmax - nested.nested.offset).view(-1)
    blocks = nested.nested.absmax2.repeat_interleave(256)[: scaled.numel()]
    distance = (scaled / blocks)[:, None].double() - dynamic_map(CPU).double()
    best = distance.abs().min(dim=1).values
    chosen = distance.gather(1, nested.absmax.long()[:, None]).abs().squeeze(1)
    assert (chosen - best).max() < 1e-6


def test_packed_for_cpu_is_recognised(bnb):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    w = weight((64, 128), torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    canonical = pk.Weight4bit.from_bnb((packed, state))
    repacked, repacked_state = _convert_weight_packed_for_cpu(packed.clone(), state)
    ours = pk.Weight4bit.from_bnb((repacked, repacked_state))
    assert torch.equal(ours.packed, canonical.packed)
    assert torch.equal(ours.absmax, repacked_state.absmax.t().float().reshape(-1))


def test_other_storage_dtype(bnb):
    w = weight((64, 64), torch.bfloat16)
    expected, _ = bnb.functional.quantize_4bit(w, quant_type="nf4")
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    assert torch.equal(pk.Weight4bit.from_bnb((packed, state)).packed, expected.view(-1))


def test_empty(backend):
    w = pk.Weight4bit.quantize(torch.empty(0, 64), double_quant=False)
    assert w.dequantize().shape == (0, 64)


def test_library_op():
    w = pk.Weight4bit.quantize(torch.randn(8, 64))
    if reason := dispatch.why_not("nf4", "native", w.device, ()):
        pytest.skip(reason)
    arguments = (w.parts(), w.meta(), torch.bfloat16, "native")
    torch.library.opcheck(torch.ops.peft_kernels.dequantize_4bit.default, arguments)


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy."""

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"w: expected a dtype.*float64.*Cast"):
            pk.Weight4bit.quantize(torch.randn(4, 64, dtype=torch.float64))

    def test_ndim(self):
        with pytest.raises(ValueError, match=r"w: expected 2 dimensions.*\(64,\)"):
            pk.Weight4bit.quantize(torch.randn(64))

    def test_quant_type(self):
        with pytest.raises(ValueError, match="quant_type: expected one of.*'int4'"):
            pk.Weight4bit.quantize(torch.randn(4, 64), quant_type="int4")

    def test_blocksize(self):
        with pytest.raises(ValueError, match="blocksize: expected one of.*48"):
            pk.Weight4bit.quantize(torch.randn(4, 64), blocksize=48)

    def test_truncated(self):
        w = pk.Weight4bit.quantize(torch.randn(4, 64))
        with pytest.raises(ValueError, match=r"packed: expected 128 elements.*100.*truncated"):
            pk.Weight4bit(w.packed[:100], w.absmax, w.nested, w.shape, w.dtype, w.blocksize, w.quant_type)

    def test_not_quantized(self, bnb):
        with pytest.raises(ValueError, match="quant_state None.*Move the layer"):
            pk.Weight4bit.from_bnb(bnb.nn.Linear4bit(64, 64).weight)

    def test_not_a_weight(self):
        with pytest.raises(TypeError, match="weight: expected a Weight4bit, got int"):
            pk.functional.dequantize_4bit(3)


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_quantize_compiles(backend, double_quant):
    def function(w):
        return pk.Weight4bit.quantize(w, double_quant=double_quant).dequantize()

    w = torch.randn(20, 96)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(w), function(w))


def test_library_ops():
    absmax = torch.rand(700)
    torch.library.opcheck(torch.ops.peft_kernels.quantize_4bit.default, (torch.randn(333), 64, "nf4", "native"))
    torch.library.opcheck(torch.ops.peft_kernels.quantize_nested.default, (absmax,))
