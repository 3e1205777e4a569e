"""The Triton codec equals the reference bit for bit."""

import dataclasses

import pytest
import torch
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels import Weight4bit, use_backend
from peft_kernels.ops.nf4 import reference, triton_kernels

__all__ = ["seed"]  # fixtures
DTYPES = [torch.float32, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("numel", [1, 63, 64, 4099, 8192])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize(quant_type, numel, blocksize, dtype, poison):
    x = randn(numel, dtype=dtype)
    x[: min(numel, 64)] = 0
    packed, absmax = triton_kernels.quantize(x, blocksize, quant_type)
    expected_packed, expected_absmax = reference.quantize(x, blocksize, quant_type)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_non_finite(bad):
    x = randn(300)
    x[7] = bad
    for ours, theirs in zip(triton_kernels.quantize(x, 64, "nf4"), reference.quantize(x, 64, "nf4"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (33, 65), (64, 128)], ids=str)
@pytest.mark.parametrize("quant_type, blocksize", [("nf4", 64), ("nf4", 32), ("fp4", 256)])
def test_dequantize(quant_type, blocksize, shape, nested, dtype, poison):
    with use_backend("reference"):
        weight = Weight4bit.quantize(randn(*shape), quant_type=quant_type, blocksize=blocksize, double_quant=nested)
        expected = weight.dequantize(dtype)
    assert torch.equal(triton_kernels.dequantize(weight, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type, blocksize", [("nf4", 64), ("fp4", 256)])
def test_dequantize_tiled(quant_type, blocksize, nested, dtype, poison):
    weight = Weight4bit.quantize(randn(33, 256), quant_type=quant_type, blocksize=blocksize, double_quant=nested)
    tiled = weight.with_layout("tiled")
    expected = triton_kernels.dequantize(weight, dtype)
    assert torch.equal(triton_kernels.dequantize(tiled, dtype), expected)
    unaligned = dataclasses.replace(tiled, packed=torch.cat([tiled.packed[:1], tiled.packed])[1:])
    assert torch.equal(triton_kernels.dequantize(unaligned, dtype), expected)


def test_dequantize_into_scratch():
    weight = Weight4bit.quantize(randn(9, 64))
    out = torch.full((9, 64), float("nan"), device=DEVICE)
    assert triton_kernels.dequantize(weight, torch.float32, out=out) is out
    assert torch.equal(out, weight.dequantize(torch.float32))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("layout", ["bnb", "tiled"])
def test_dequantize_window(layout, nested, poison):
    weight = Weight4bit.quantize(randn(300, 192), double_quant=nested).with_layout(layout)
    w = weight.dequantize(torch.float32)
    rows, columns = slice(261, 299), slice(64, 192)
    assert torch.equal(triton_kernels.dequantize(weight, torch.float32, rows=rows), w[rows])
    assert torch.equal(triton_kernels.dequantize(weight, torch.float32, columns=columns), w[:, columns])
    assert torch.equal(triton_kernels.dequantize(weight, torch.float32, None, rows, columns), w[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_into_rows_apart(dtype):
    """Beside other columns, which stay as they are."""
    weight = Weight4bit.quantize(randn(300, 192))
    out = torch.full((38, 208), 7.0, dtype=dtype, device=DEVICE)
    triton_kernels.dequantize(weight, dtype, out[:, :192], rows=slice(261, 299))
    assert torch.equal(out[:, :192], weight.dequantize(dtype)[261:299]) and (out[:, 192:] == 7).all()


def test_why_not():
    assert triton_kernels.why_not(DEVICE, (torch.float32,)) is None
    assert "float64" in triton_kernels.why_not(DEVICE, (torch.float64,))
    assert "meta" in triton_kernels.why_not(torch.device("meta"), (torch.float32,))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_dequantize_past_2_to_31_elements():
    rows, k = 2**17 + 3, 2**14
    weight = Weight4bit.quantize(torch.zeros(rows, k, dtype=torch.bfloat16, device=DEVICE), double_quant=False)
    weight.absmax.fill_(2.0)
    weight.packed[-1] = 0xFF
    assert triton_kernels.dequantize(weight, torch.bfloat16)[-1, -2:].tolist() == [2.0, 2.0]
