"""The fused 4-bit GEMMs, and the decode + vendor path, against a float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels import Weight4bit, functional, use_backend
from peft_kernels.ops.linear_4bit import triton_kernels, triton_vendor
from peft_kernels.testing import assert_within_budget

__all__ = ["seed"]  # fixtures

# rows, N, K, quant_type, blocksize, nested, bias, layout: every way to decode a tile, every row tile, odd sizes
CASES = {
    "one-row": (1, 96, 256, "nf4", 64, True, True, "bnb"),
    "one-row-tiled": (1, 96, 256, "nf4", 64, True, True, "tiled"),
    "two-blocks-per-tile": (5, 70, 128, "nf4", 32, False, True, "bnb"),
    "straddling-blocks": (3, 33, 65, "nf4", 64, True, False, "bnb"),
    "fp4": (17, 40, 192, "fp4", 64, True, True, "bnb"),
    "fp4-tiled": (17, 40, 192, "fp4", 64, True, True, "tiled"),
    "wide-blocks": (33, 64, 512, "nf4", 256, True, False, "bnb"),
    "wide-blocks-tiled": (33, 64, 512, "nf4", 256, True, False, "tiled"),
    "K-576": (65, 130, 576, "nf4", 64, False, True, "bnb"),
    "K-576-tiled": (65, 130, 576, "nf4", 64, False, True, "tiled"),
}
if DEVICE.type == "cuda":
    for _layout in ("bnb", "tiled"):
        CASES |= {
            f"decode-{_layout}": (1, 14336, 4096, "nf4", 64, True, True, _layout),
            f"prefill-{_layout}": (300, 4096, 14336, "nf4", 64, True, False, _layout),
        }


def quantized(n, k, quant_type, blocksize, nested, layout="bnb"):
    w = randn(n, k, scale=0.1)
    weight = Weight4bit.quantize(w, quant_type=quant_type, blocksize=blocksize, double_quant=nested)
    return weight.with_layout(layout)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows, n, k, quant_type, blocksize, nested, has_bias, layout", CASES.values(), ids=CASES)
def test_fused(rows, n, k, quant_type, blocksize, nested, has_bias, layout, dtype, poison):
    weight = quantized(n, k, quant_type, blocksize, nested, layout)
    assert weight.layout == layout
    exact, rounded = weight.dequantize(torch.float32).double(), weight.dequantize(dtype)
    x, dy = randn(rows, k, dtype=dtype), randn(rows, n, dtype=dtype)
    bias = randn(n, dtype=dtype) if has_bias else None
    y = triton_kernels.fused_forward(x, weight, bias, None)
    wide_bias = None if bias is None else bias.double()
    assert_within_budget(y, F.linear(x.double(), exact, wide_bias), F.linear(x, rounded, bias), "y")
    dx = triton_kernels.fused_backward(dy, weight, None)
    assert_within_budget(dx, dy.double() @ exact, dy @ rounded, "dx")
    assert torch.equal(y, triton_kernels.fused_forward(x, weight, bias, None)), "two runs differ"


@pytest.mark.parametrize("layout", ["bnb", "tiled"])
def test_decode_by_table(layout, monkeypatch, poison):
    """The way of AMD's cards, on whatever runs here."""
    monkeypatch.setattr(triton_kernels, "_decode_kind", lambda weight, on: "lut")
    weight = quantized(70, 192, "nf4", 64, True, layout)
    exact, rounded = weight.dequantize(torch.float32).double(), weight.dequantize(torch.float16)
    x, dy = randn(5, 192, dtype=torch.float16), randn(5, 70, dtype=torch.float16)
    y, dx = triton_kernels.fused_forward(x, weight, None, None), triton_kernels.fused_backward(dy, weight, None)
    assert_within_budget(y, x.double() @ exact.t(), x @ rounded.t(), "y")
    assert_within_budget(dx, dy.double() @ exact, dy @ rounded, "dx")


@pytest.mark.parametrize("layout", ["bnb", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_decode_and_vendor_gemm(dtype, layout):
    weight = quantized(40, 64, "nf4", 64, True, layout)
    x = randn(700, 64, dtype=dtype)
    assert not triton_kernels.fused(x, weight)
    w = weight.dequantize(dtype)
    torch.testing.assert_close(triton_kernels.forward(x, weight, None), x @ w.t(), rtol=0, atol=0)
    torch.testing.assert_close(triton_kernels.backward(x @ w.t(), weight), (x @ w.t()) @ w, rtol=0, atol=0)


def test_panels(monkeypatch, poison):
    """A weight above the scratch's limit is decoded and multiplied panel by panel, to the same result."""
    monkeypatch.setattr(triton_vendor, "_MOST_BYTES", 2 * 64 * 2000)  # two or three panels
    weight = quantized(4096 + 32, 64, "nf4", 64, True)
    x = randn(3, 64, dtype=torch.float16)
    w, bias = weight.dequantize(torch.float16), randn(4096 + 32, dtype=torch.float16)
    exact, onto = x.double() @ w.double().t(), randn(3, 4096 + 32, dtype=torch.float16)
    assert_within_budget(triton_vendor.vendor_forward(x, weight, None), exact, x @ w.t())
    assert_within_budget(triton_vendor.vendor_forward(x, weight, bias), exact + bias, F.linear(x, w, bias))
    expected, eager = onto + exact, onto + x @ w.t()
    assert triton_vendor.vendor_forward(x, weight, None, onto=onto) is onto
    assert_within_budget(onto, expected, eager)
    monkeypatch.setattr(triton_vendor, "_MOST_BYTES", 2 * 5 * 100)  # a whole block of columns at a time
    wide = quantized(5, 320, "nf4", 64, True)
    dy = randn(3, 5, dtype=torch.float16)
    w = wide.dequantize(torch.float16)
    assert_within_budget(triton_vendor.vendor_backward(dy, wide), dy.double() @ w.double(), dy @ w)


def test_strided_rows():
    weight = quantized(24, 64, "nf4", 64, True)
    wide = randn(6, 128, dtype=torch.float16)
    for x in (wide[:, :64], wide[:, 64:][::2], wide[:, :64].t().contiguous().t(), wide[:1, :64].expand(6, 64)):
        expected = triton_kernels.forward(x.contiguous(), weight, None)
        assert torch.equal(triton_kernels.forward(x, weight, None), expected)


def test_public_function_and_gradient():
    weight = quantized(24, 64, "nf4", 64, True)
    x = randn(2, 3, 64, dtype=torch.float16).requires_grad_()
    bias = randn(24, dtype=torch.float16).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            y = functional.linear_4bit(x, weight, bias)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, bias))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
