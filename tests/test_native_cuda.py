"""The CUDA kernels against a float64 reference: emulated on any machine, and on a GPU where there is one.

The emulation is the same source compiled as C++ for the host, so it shows that arithmetic, indices and barriers are
right; it shows nothing about the compiled code of a device.
"""

import pytest
import torch
import torch.nn.functional as F
from cuda_support import beside_a_fault, emulation, place

from peft_kernels import BackendError, Weight4bit, dispatch, explain, functional, native, use_backend
from peft_kernels.ops.linear_4bit import cuda_calls
from peft_kernels.ops.lora_linear import native_calls as lora
from peft_kernels.ops.nf4.native_calls import native_weight
from peft_kernels.testing import assert_within_budget

__all__ = ["emulation", "place"]  # fixtures

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# M, N, K, dtype, quant_type, blocksize, nested, bias dtype, rank of the adapter: every number of rows that a kernel
# changes at, windows of half a block, columns for one warp and for several turns of all, rows past the last tile
CASES = {
    "one-row": (1, 37, 192, BF16, "nf4", 64, True, BF16, 0),
    "two-rows-fp16": (2, 16, 64, FP16, "nf4", 64, True, None, 0),
    "four-rows-plain": (4, 50, 1024, BF16, "nf4", 64, False, FP32, 16),
    "five-rows-fp4": (5, 37, 320, FP16, "fp4", 64, True, FP16, 3),
    "eight-rows": (8, 33, 576, BF16, "nf4", 64, True, None, 16),
    "nine-rows-fp16-plain": (9, 17, 192, FP16, "nf4", 64, False, BF16, 1),
    "sixteen-rows": (16, 41, 1088, BF16, "nf4", 64, True, BF16, 16),
    "straddling-blocks": (3, 37, 192, BF16, "nf4", 128, True, None, 5),
    "straddling-wide": (7, 9, 960, FP16, "fp4", 256, False, None, 0),
    "one-block-a-row": (13, 20, 4096, BF16, "nf4", 4096, True, FP32, 8),
    "every-window-of-a-warp": (2, 19, 6208, BF16, "nf4", 64, True, FP16, 16),
    "sixteen-rows-of-two-windows": (16, 19, 3136, BF16, "nf4", 64, True, FP16, 5),
    "fewer-rows-than-a-tile": (16, 1, 128, FP16, "nf4", 64, True, FP16, 2),
}
if torch.cuda.is_available():
    CASES |= {
        "real-one-row": (1, 14336, 4096, BF16, "nf4", 64, True, BF16, 16),
        "real-sixteen-rows": (16, 4096, 14336, BF16, "nf4", 64, True, None, 16),
    }


class Inputs:
    """A layer and its input, the truth and eager torch's answer."""

    def __init__(self, device, m, n, k, dtype, quant_type="nf4", blocksize=64, nested=True, bias=None, rank=0):
        generator = torch.Generator().manual_seed(m * n + k)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        weight = Weight4bit.quantize(randn(n, k) / 8, quant_type=quant_type, blocksize=blocksize, double_quant=nested)
        self.x, self.weight = randn(m, k).to(device, dtype), weight.to(device)
        self.bias = None if bias is None else randn(n).to(device, bias)
        self.lora_A = [(randn(rank, k) / k**0.5).to(device)] if rank else []
        self.lora_B = [(randn(n, rank) / 4).to(device, dtype)] if rank else []
        self.scaling = [0.5] * len(self.lora_A)

    def forward(self, x=None):
        """y by the CUDA kernels."""
        x = self.x if x is None else x
        if not self.lora_A:
            return cuda_calls.forward(x, self.weight, self.bias)
        ps = [0.0] * len(self.lora_A)
        return lora._forward_cuda(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, ps)[0]

    def check(self, y):
        """Hold y to the budget."""
        exact = self.weight.dequantize(FP32).double()
        bias = None if self.bias is None else self.bias.double()
        truth = F.linear(self.x.double(), exact, bias)
        eager = F.linear(self.x, exact.to(self.x.dtype), None if bias is None else bias.to(self.x.dtype))
        for a, b, scaling in zip(self.lora_A, self.lora_B, self.scaling, strict=True):
            truth += scaling * (self.x.double() @ a.double().T) @ b.double().T
            eager = eager + scaling * F.linear(F.linear(self.x, a.to(self.x.dtype)), b.to(self.x.dtype))
        assert_within_budget(y, truth, eager, "y")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(place, case, poison):
    inputs = Inputs(place.device, *case)
    y = inputs.forward()
    inputs.check(y)
    place.shape(seed=1, multiprocessors=1)  # another order of threads, other tiles for a block: the same sums
    assert torch.equal(inputs.forward(), y)


@pytest.mark.parametrize("m, k, dtype, splits", [(1, 8256, BF16, 2), (6, 8256, FP16, 2), (16, 8256, BF16, 3)])
def test_k_is_split_where_registers_do_not_hold_x(place, m, k, dtype, splits, poison):
    """Through float32 planes, and a second kernel that adds up, with bias and adapter."""
    inputs = Inputs(place.device, m, 40, k, dtype, bias=FP32, rank=4)
    assert native.cuda_core().linear_4bit_splits(m, k) == splits
    inputs.check(inputs.forward())


def test_several_adapters(place):
    inputs = Inputs(place.device, 3, 40, 256, BF16, rank=4)
    other = Inputs(place.device, 5, 40, 256, BF16, rank=7)
    inputs.lora_A += other.lora_A
    inputs.lora_B += other.lora_B
    inputs.scaling = [0.5, 2.0]
    inputs.check(inputs.forward())


def test_strided_rows(place):
    """Rows that are not aligned, or far apart."""
    inputs = Inputs(place.device, 3, 24, 192, BF16, rank=4)
    y = inputs.forward()
    wide = torch.full((3, 203), float("nan"), dtype=BF16, device=place.device)
    wide[:, 3:195] = inputs.x
    for x in (wide[:, 3:195], inputs.x.t().contiguous().t(), torch.cat([inputs.x, inputs.x], dim=1)[:, :192]):
        assert torch.equal(inputs.forward(x), y)


@pytest.mark.parametrize("place", ["emulated"], indirect=True)
@pytest.mark.parametrize("m, n, k", [(1, 37, 320), (5, 17, 192), (16, 33, 5056)])
@pytest.mark.parametrize("end", [False, True], ids=["before", "after"])
def test_nothing_is_read_beyond_the_tensors(place, m, n, k, end):
    """Each lies beside a page that faults."""
    inputs = Inputs(place.device, m, n, k, BF16, bias=FP32, rank=3)
    y = inputs.forward()
    inputs.x, inputs.bias = beside_a_fault(inputs.x, end), beside_a_fault(inputs.bias, end)
    parts = [beside_a_fault(part, end) for part in inputs.weight.parts()]
    inputs.weight = Weight4bit.from_parts(parts, inputs.weight.meta())
    inputs.lora_A, inputs.lora_B = ([beside_a_fault(t, end) for t in ts] for ts in (inputs.lora_A, inputs.lora_B))
    assert torch.equal(inputs.forward(), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [3, 7, 16])
def test_nan_and_infinity_stay_where_they_are(place, m, value):
    """In x: in its row. In a block's scale: in its column."""
    inputs = Inputs(place.device, m, 37, 320, BF16, nested=False)
    clean = inputs.forward()
    x = inputs.x.clone()
    x[1, 319] = value
    dirty = inputs.forward(x)
    eager = F.linear(x, inputs.weight.dequantize(BF16))
    assert torch.equal(dirty[1].isfinite(), eager[1].isfinite())
    others = [i for i in range(m) if i != 1]
    assert torch.equal(dirty[others], clean[others])
    inputs.weight.absmax[5 * 3 + 1] = value  # five blocks a row
    spoilt = inputs.forward()
    assert not spoilt[:, 3].isfinite().any()
    columns = [n for n in range(37) if n != 3]
    assert torch.equal(spoilt[:, columns], clean[:, columns])


@pytest.mark.parametrize(
    "m, n, k, blocksize, what",
    [(17, 8, 64, 64, "17 rows"), (1, 8, 100, 64, "multiple of 64"), (1, 8, 64, 32, "blocksize is 32")],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_refusals(place, m, n, k, blocksize, what, rank):
    inputs = Inputs(place.device, m, n, k, BF16, blocksize=blocksize, rank=rank)
    with pytest.raises(BackendError, match=f"{what}.*use_backend"):
        inputs.forward()


def test_refusals_of_an_adapter(place):
    inputs = Inputs(place.device, 2, 8, 64, BF16, rank=2)
    adapter = inputs.lora_A, inputs.lora_B, [1.0]
    with pytest.raises(BackendError, match="not dropout"):
        lora._forward_cuda(inputs.x, inputs.weight, None, *adapter, [0.1])
    with pytest.raises(BackendError, match="not a dense one"):
        lora._forward_cuda(inputs.x, inputs.weight.dequantize(), None, *adapter, [0.0])


def test_bad_arguments(place):
    inputs = Inputs(place.device, 2, 16, 64, BF16)
    x, y, view = inputs.x, torch.empty(2, 16, dtype=BF16, device=place.device), native_weight(inputs.weight)
    core, good = native.cuda_core(), {"device": 0, "stream": 0, "x": x.data_ptr(), "dtype": 2, "M": 2, "ldx": 64}
    good |= {"weight": view, "bias": 0, "bias_dtype": 0, "s": 0, "b": 0, "b_dtype": 0, "rank": 0, "scaling": 1.0}
    good |= {"y": y.data_ptr(), "planes": 0}
    core.linear_4bit_decode(**good)
    for bad in ({"x": 0}, {"y": 0}, {"M": 0}, {"M": 17}, {"ldx": 60}, {"dtype": 0}, {"dtype": 9}, {"s": y.data_ptr()}):
        with pytest.raises(ValueError):
            core.linear_4bit_decode(**{**good, **bad})
    sums = torch.empty(2, 2, device=place.device)
    shrink = {"device": 0, "stream": 0, "x": x.data_ptr(), "dtype": 2, "M": 2, "K": 64, "ldx": 64, "a": x.data_ptr()}
    shrink |= {"a_dtype": 2, "rank": 2, "s": sums.data_ptr()}
    core.lora_shrink_decode(**shrink)
    for bad in ({"x": 0}, {"a": 0}, {"s": 0}, {"M": 17}, {"rank": 0}, {"dtype": 0}, {"ldx": 8}):
        with pytest.raises(ValueError):
            core.lora_shrink_decode(**{**shrink, **bad})


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_are_those_of_triton(emulation, quant_type, dtype):
    pytest.importorskip("triton")
    from peft_kernels.triton_common.decode import MULTIPLIER, multiplied_codes

    *codes, unit = emulation[0].decode_table(["nf4", "fp4"].index(quant_type), native.dtype_code(dtype))
    assert codes == multiplied_codes(quant_type, dtype).tolist()
    assert unit == torch.tensor(1 / MULTIPLIER[quant_type][dtype]).item()


@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_device_with_too_little_shared_memory_is_refused(place):
    assert native.cuda_core().device_unsupported(0) == ""
    place.shape(shared_memory=99 << 10)
    assert f"{99 << 10} bytes of shared memory" in native.cuda_core().device_unsupported(0)


@pytest.mark.parametrize("place", ["emulated"], indirect=True)
@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear"])
def test_auto_takes_them_for_the_calls_that_they_serve(place, op, monkeypatch):
    """Others go on to Triton; asked for by name, the kernels refuse those themselves."""
    monkeypatch.setattr(native, "why_not_cuda", lambda device, dtypes: None)
    dispatch._search.cache_clear()

    def chosen(m, k=128, blocksize=64, tiled=False, differentiated=False, dropout_p=0.0):
        weight = Inputs("cpu", 1, 16, k, BF16, blocksize=blocksize).weight
        call = torch.zeros(m, k, dtype=BF16), weight.with_layout("tiled") if tiled else weight, differentiated
        call = (*call, [dropout_p]) if op == "lora_linear" else call
        device = torch.device("cuda", 0)
        recorded = dispatch.record(lambda: dispatch.choose(op, device, (BF16,), call=call))[0]
        return recorded.chosen, recorded.passed_over.get("native", "")

    assert chosen(16) == ("native", "")
    cases = [({"m": 17}, "at most 16 rows"), ({"m": 1, "differentiated": True}, "no backward")]
    cases += [({"m": 1, "k": 96, "blocksize": 32}, "multiple of 64"), ({"m": 1, "tiled": True}, "layout")]
    cases += [({"m": 1, "dropout_p": 0.5}, "no dropout")] if op == "lora_linear" else []
    for call, reason in cases:
        backend, why = chosen(**call)
        assert backend != "native" and reason in why
        with use_backend("native"):
            assert chosen(**call) == ("native", "")
    dispatch._search.cache_clear()


def test_reasons():
    device = torch.device("cuda", 0)
    assert "not torch.float32" in native.why_not_cuda(device, (FP32,))
    assert "not torch.float64" in native.why_not_cuda(device, (BF16, torch.float64))
    if not torch.cuda.is_available():
        reason = native.why_not_cuda(device, (BF16,))
        assert "PEFT_KERNELS_BUILD=cuda" in reason or "do not run on cuda:0" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["card"], indirect=True)
class TestDevice:
    """What a call owes to its surroundings, on a device."""

    def test_public_functions(self, place):
        inputs = Inputs(place.device, 6, 96, 256, BF16, bias=BF16, rank=8)
        x = inputs.x.view(2, 3, 256).requires_grad_()
        (a,), (b,) = inputs.lora_A, inputs.lora_B
        with use_backend("native"):
            y = functional.linear_4bit(x, inputs.weight, inputs.bias)
            with pytest.raises(BackendError, match="backward"):
                y.float().sum().backward()
            adapted = functional.lora_linear(x, inputs.weight, a, b, scaling=0.5, bias=inputs.bias)
        inputs.check(adapted.detach().view(6, 96))
        inputs.lora_A, inputs.lora_B, inputs.scaling = [], [], []
        inputs.check(y.detach().view(6, 96))

    def test_auto(self, place):
        """Few rows without gradients are theirs; with gradients, and more rows, Triton's."""
        pytest.importorskip("triton")
        inputs = Inputs(place.device, 6, 96, 256, BF16, bias=BF16, rank=8)
        (a,), (b,), weight = inputs.lora_A, inputs.lora_B, inputs.weight

        def plain(x):
            return functional.linear_4bit(x, weight, inputs.bias)

        def adapted(x):
            return functional.lora_linear(x, weight, a, b, scaling=0.5, bias=inputs.bias)

        for call in (plain, adapted):
            assert explain(call, inputs.x).splitlines()[0].endswith(": native")
            assert explain(call, inputs.x.repeat(3, 1)).splitlines()[0].endswith(": triton")
            x = inputs.x.clone().requires_grad_()
            assert explain(call, x).splitlines()[0].endswith(": triton")
            call(x).float().sum().backward()
            assert x.grad.isfinite().all()
        inputs.check(adapted(inputs.x))

    def test_side_streams(self, place):
        layers = [Inputs(place.device, m, 512, 1024, BF16, rank=16) for m in (1, 16)]
        expected = [layer.forward() for layer in layers]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in layers], []
        for _ in range(5):
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer.forward())
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(results))

    @pytest.mark.parametrize("m, k", [(1, 1024), (16, 14336)])
    def test_graph(self, place, m, k):
        layer = Inputs(place.device, m, 512, k, BF16, rank=16)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer.forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.forward()
        layer.x.copy_(torch.randn_like(layer.x))
        graph.replay()
        assert torch.equal(y, layer.forward())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_other_device(self, place):
        layer = Inputs(torch.device("cuda", 1), 4, 512, 1024, BF16, rank=16)
        layer.check(layer.forward())
        assert torch.cuda.current_device() == 0
