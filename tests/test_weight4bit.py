"""Weight4bit's own contract: what it refuses when it is made, and caches that no mode can spoil."""

import dataclasses
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
from peft_kernels.ops.nf4.reference import code_book, dynamic_map, tensor_cache

OP = "nf4"
CPU = torch.device("cpu")


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def weight():
    return pk.Weight4bit.quantize(torch.randn(64, 64))


def nested(weight, **changes):
    return dataclasses.replace(weight, nested=dataclasses.replace(weight.nested, **changes))


def strided(tensor):
    return tensor.repeat_interleave(2)[::2]


class TestParts:
    """Kernels read the memory of these tensors, so nothing else may get as far."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    @pytest.mark.parametrize("field", ["absmax2", "code", "offset"])
    def test_nested_dtype(self, weight, field, dtype):
        wrong = getattr(weight.nested, field).to(dtype)
        with pytest.raises(ValueError, match=rf"nested.{field}: expected torch.float32, got {dtype}"):
            nested(weight, **{field: wrong})

    def test_strides(self, weight):
        with pytest.raises(ValueError, match=r"nested.code: expected a contiguous tensor.*contiguous\(\)"):
            nested(weight, code=strided(weight.nested.code))
        for field in ("packed", "absmax"):
            with pytest.raises(ValueError, match=f"{field}: expected a contiguous tensor"):
                dataclasses.replace(weight, **{field: strided(getattr(weight, field))})

    def test_device(self, weight):
        with pytest.raises(ValueError, match=r"absmax: expected device cpu \(that of packed\), got meta"):
            dataclasses.replace(weight, absmax=weight.absmax.to("meta"))

    def test_not_a_tensor(self, weight):
        with pytest.raises(TypeError, match="nested.offset: expected a torch.Tensor, got float"):
            nested(weight, offset=0.5)

    @pytest.mark.parametrize("blocksize", [0, -64, 48])
    def test_blocksize(self, weight, blocksize):
        with pytest.raises(ValueError, match=f"blocksize: expected a power of two, at least 32, got {blocksize}"):
            dataclasses.replace(weight, blocksize=blocksize)

    def test_nested_blocksize(self, weight):
        with pytest.raises(ValueError, match=r"nested.blocksize: expected at least 1, got 0"):
            nested(weight, blocksize=0)

    def test_dtype(self, weight):
        with pytest.raises(ValueError, match=r"dtype: expected one of.*got torch.int8"):
            dataclasses.replace(weight, dtype=torch.int8)

    def test_negative_shape(self, weight):
        with pytest.raises(ValueError, match="shape: expected"):
            dataclasses.replace(weight, shape=(-64, -64))


class TestCalls:
    """Arguments of the methods."""

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
    def test_dequantize_dtype(self, backend, weight, dtype):
        with pytest.raises(ValueError, match=rf"dtype: expected one of.*got {dtype}"):
            pk.functional.dequantize_4bit(weight, dtype)

    def test_dequantize_name(self, weight):
        with pytest.raises(TypeError, match="dtype: expected one of.*got str"):
            weight.dequantize("float32")

    def test_quantize_sparse(self):
        with pytest.raises(ValueError, match=r"w: expected a dense tensor, got torch.sparse_coo.*to_dense"):
            pk.Weight4bit.quantize(torch.eye(64).to_sparse())


class TestFromBnb:
    """What may come in the place of bitsandbytes' weight."""

    @pytest.fixture
    def pair(self, bnb):
        return bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)

    @pytest.mark.parametrize("shape", [(4096,), (4, 16, 64), None], ids=str)
    def test_shape(self, pair, shape):
        pair[1].shape = shape
        with pytest.raises(ValueError, match=r"quant_state.shape: expected \(N, K\)"):
            pk.Weight4bit.from_bnb(pair)

    def test_tuple(self, pair):
        with pytest.raises(ValueError, match=r"weight: expected a pair \(packed, quant_state\), got 3 items"):
            pk.Weight4bit.from_bnb((*pair, None))

    def test_dict(self, pair):
        with pytest.raises(TypeError, match="quant_state: expected a bitsandbytes QuantState, got dict"):
            pk.Weight4bit.from_bnb((pair[0], pair[1].as_dict()))

    @pytest.mark.parametrize(("shape", "length"), [((64, 64), 2000), ((48, 64), 1536)], ids=["truncated", "rows"])
    def test_packed_for_cpu(self, shape, length):
        facts = {"blocksize": 64, "quant_type": "nf4", "dtype": torch.bfloat16, "packing_format_for_cpu": True}
        absmax = torch.ones(1, shape[0], dtype=torch.bfloat16)
        state = types.SimpleNamespace(absmax=absmax, shape=shape, nested=False, **facts)
        with pytest.raises(ValueError, match=r"weight: expected \d+ bytes of whole groups of 32 rows"):
            pk.Weight4bit.from_bnb((torch.zeros(length, 1, dtype=torch.uint8), state))

    def test_offset_of_another_dtype(self, pair):
        """bitsandbytes makes it in torch's default dtype, which transformers sets to the model's while it loads."""
        before = pk.Weight4bit.from_bnb(pair)
        pair[1].offset = pair[1].offset.bfloat16()
        after = pk.Weight4bit.from_bnb(pair)
        assert after.nested.offset.dtype == torch.float32
        torch.testing.assert_close(after.dequantize(), before.dequantize(), rtol=0, atol=0.05)


def test_to_bnb_shares_no_code_book(bnb):
    first, second = (pk.Weight4bit.quantize(torch.randn(4, 64)).to_bnb().quant_state.code for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_no_rows(backend, double_quant):
    empty = pk.Weight4bit.quantize(torch.randn(0, 64), double_quant=double_quant)
    assert empty.dequantize().shape == (0, 64)
    x = torch.randn(5, 64, requires_grad=True)
    y = pk.functional.linear_4bit(x, empty)
    y.sum().backward()
    assert y.shape == (5, 0) and torch.equal(x.grad, torch.zeros(5, 64))


class TestCaches:
    """The first use must leave ordinary tensors behind, whatever mode it is in."""

    def setup_method(self):
        self.book = tensor_cache(lambda device: torch.arange(3.0, device=device))

    def test_inference_mode(self):
        with torch.inference_mode():
            assert not self.book(CPU).is_inference()
        assert self.book(CPU) is self.book(CPU)

    def test_fake_tensors(self):
        with FakeTensorMode() as mode:
            assert self.book(CPU).fake_mode is mode
        assert type(self.book(CPU)) is torch.Tensor
        with FakeTensorMode() as mode:
            assert self.book(CPU).fake_mode is mode
            assert dynamic_map(CPU).fake_mode is mode and code_book("nf4", CPU).fake_mode is mode

    def test_transforms(self):
        torch.func.grad(lambda x: (x * self.book(CPU)).sum())(torch.ones(3))
        assert self.book(CPU).data_ptr()

    @pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
    def test_compile(self, double_quant):
        def round_trip(w):
            return pk.Weight4bit.quantize(w, double_quant=double_quant).dequantize()

        w = torch.randn(8, 64)
        with pk.use_backend("reference"):
            compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(w), round_trip(w))
