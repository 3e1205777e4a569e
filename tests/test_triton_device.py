"""What a call owes to its surroundings: streams, graphs, other devices, torch.compile, memory."""

import pytest
import torch
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels import Weight4bit, functional, use_backend
from peft_kernels.ops.linear_4bit import triton_kernels, triton_vendor

__all__ = ["seed"]  # fixtures
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
RANK = 8


class Layer:
    """A QLoRA layer: called with x, it returns y by the Triton kernels."""

    def __init__(self, n, k, dtype, device=DEVICE, layout="bnb"):
        self.weight = Weight4bit.quantize(randn(n, k, scale=0.1)).with_layout(layout).to(device)
        self.lora_A = randn(RANK, k, dtype=dtype, scale=0.1).to(device).requires_grad_()
        self.lora_B = randn(n, RANK, dtype=dtype, scale=0.1).to(device).requires_grad_()

    def __call__(self, x):
        with use_backend("triton"):
            return functional.lora_linear(x, self.weight, self.lora_A, self.lora_B, scaling=2.0)

    def with_gradients(self, call, x):
        """[y, dx, dA, dB]."""
        x = x.clone().requires_grad_()
        y = call(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, self.lora_A, self.lora_B))]


def rows():
    """Served by the fused kernels, and by decode to scratch (the interpreter's cross-over is at 128)."""
    return (3, 700) if DEVICE.type == "cuda" else (3, 130)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compile(dtype):
    layer = Layer(40, 64, dtype)
    for m in rows():
        x = randn(m, 64, dtype=dtype)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(layer.with_gradients(compiled, x), layer.with_gradients(layer, x), strict=True):
            torch.testing.assert_close(ours, eager)


def test_unaligned_words():
    """Packed bytes that start at an odd address take another way, to the same result."""
    weight = Weight4bit.quantize(randn(40, 128, scale=0.1))
    odd = torch.cat([weight.packed[:1], weight.packed])[1:]
    assert odd.data_ptr() % 4
    parts = [odd, *weight.parts()[1:]]
    x, other = randn(3, 128, dtype=torch.float16), Weight4bit.from_parts(parts, weight.meta())
    y, expected = (triton_kernels.fused_forward(x, w, None, None) for w in (other, weight))
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(triton_vendor.decode(other, torch.float16), weight.dequantize(torch.float16))


@needs_gpu
@pytest.mark.parametrize("layout", ["bnb", "tiled"])
def test_side_stream(layout):
    """Results on two streams at once, whose scratches must not meet."""
    layer = Layer(256, 512, torch.bfloat16, layout=layout)
    for m in rows():
        xs = [randn(m, 512, dtype=torch.bfloat16) for _ in range(2)]
        expected = [layer.with_gradients(layer, x) for x in xs]
        streams = [torch.cuda.Stream() for _ in xs]
        torch.cuda.synchronize()
        results = []
        for _ in range(5):
            for x, stream in zip(xs, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer.with_gradients(layer, x))
        torch.cuda.synchronize()
        for i, tensors in enumerate(results):
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected[i % 2], strict=True))


@needs_gpu
@pytest.mark.parametrize("layout", ["bnb", "tiled"])
def test_graph(layout):
    """A captured call replays on other values, also after eager calls have used the scratch."""
    layer, other = Layer(256, 512, torch.bfloat16, layout=layout), Layer(512, 512, torch.bfloat16)
    for m in rows():
        x, fresh = randn(m, 512, dtype=torch.bfloat16), randn(m, 512, dtype=torch.bfloat16)
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                layer(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            other(fresh)
            x.copy_(fresh)
            graph.replay()
            assert torch.equal(y, layer(fresh))


@needs_gpu
def test_graph_of_a_training_step():
    """Forward and backward in one capture; the scratch of eager calls in between is another one."""
    layer, other = Layer(256, 512, torch.bfloat16), Layer(512, 512, torch.bfloat16)
    for m in rows():
        x, fresh = randn(m, 512, dtype=torch.bfloat16), randn(m, 512, dtype=torch.bfloat16)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer.with_gradients(layer, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.with_gradients(layer, x)
        other(fresh)
        x.copy_(fresh)
        graph.replay()
        for ours, eager in zip(captured, layer.with_gradients(layer, fresh), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scratch_is_kept(dtype):
    """One buffer for each device, stream and dtype, which grows and is used again."""
    triton_vendor._scratch.clear()
    small, large = (Weight4bit.quantize(randn(n, 64)) for n in (32, 96))
    first = triton_vendor.decode(large, dtype)
    assert triton_vendor.decode(small, dtype).data_ptr() == first.data_ptr()
    assert triton_vendor.decode(small, torch.float32).data_ptr() != first.data_ptr()
    assert len(triton_vendor._scratch) == 2
    if DEVICE.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            assert triton_vendor.decode(small, dtype).data_ptr() != first.data_ptr()


@needs_gpu
@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device():
    layer = Layer(256, 512, torch.bfloat16, torch.device("cuda:1"))
    for m in rows():
        x = randn(m, 512, dtype=torch.bfloat16).to("cuda:1")
        y, *gradients = layer.with_gradients(layer, x)
        with torch.cuda.device(1):
            assert all(torch.equal(a, b) for a, b in zip([y, *gradients], layer.with_gradients(layer, x), strict=True))


@needs_gpu
@pytest.mark.parametrize("m", [16, 4096])
def test_memory_peak(m):
    """A forward call takes y, S and its partial sums; the decoded weight only the scratch that is there already."""
    n, k = 4096, 4096
    layer, x = Layer(n, k, torch.bfloat16), randn(m, k, dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    extra = torch.cuda.max_memory_allocated() - before
    sums = 4 * m * RANK * (1 + 16)  # S and at most 16 planes of it
    planes = 4 * m * n * (k // (16 * m)) if m <= 32 else 0
    assert extra <= y.numel() * 2 + sums + planes + (1 << 20)


@needs_gpu
@pytest.mark.parametrize("m", [16, 4096])
def test_memory_peak_of_training(m):
    """Forward and backward take y, dX, S, T and partial sums of theirs; no float32 copy of x or dY, no mask."""
    n, k = 4096, 4096
    layer, x = Layer(n, k, torch.bfloat16), randn(m, k, dtype=torch.bfloat16).requires_grad_()
    dy, leaves = randn(m, n, dtype=torch.bfloat16), (x, layer.lora_A, layer.lora_B)
    with use_backend("triton"):
        call = lambda: functional.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, dropout_p=0.1)  # noqa: E731
        torch.autograd.grad(call(), leaves, dy)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(), leaves, dy)
    extra = torch.cuda.max_memory_allocated() - before
    sums = 4 * m * RANK * (2 + 16 + n // 128) + (dy.numel() + x.numel()) // 4  # planes of dA and dB: an eighth each
    planes = 4 * m * (n + k) * (k // (16 * m)) if m <= 32 else 0
    assert extra <= 2 * m * (n + k) + sums + planes + (1 << 20)
