"""The vendor's products around the native kernels, in float32 where the processor multiplies no half precision."""

import pytest
import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels import Weight4bit, native
from peft_kernels.ops.linear_4bit import native_vendor
from peft_kernels.testing import assert_within_budget

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or ""),
    pytest.mark.usefixtures("poison"),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """As it is; and so that rows and weights of the tests take several turns."""
    if request.param == "pieces":
        monkeypatch.setattr(native_vendor, "_PANEL_BYTES", 40 * 192 * 4)
        monkeypatch.setattr(native_vendor, "_ROWS", 50)
        monkeypatch.setattr(native_vendor, "_FEW_ROWS", 32)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "4bit"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_products(isa, pieces, dtype, dense, bias_dtype):
    torch.manual_seed(0)
    four_bits = Weight4bit.quantize((torch.randn(97, 192) / 8).to(dtype))
    w = four_bits.dequantize(dtype)
    bias = None if bias_dtype is None else torch.randn(97).to(bias_dtype)
    for rows in (3, 16, 131):
        x, dy = (torch.randn(rows, 2 * width).to(dtype)[:, ::2] for width in (192, 97))
        weight = w if dense else four_bits
        exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        eager = F.linear(x, w, None if bias is None else bias.to(dtype))
        assert_within_budget(native_vendor.linear(x, weight, bias), exact, eager, f"y of {rows} rows")
        dx = native_vendor.product(dy, weight)
        assert_within_budget(dx, dy.double() @ w.double(), dy @ w, f"dx of {rows} rows")
        assert torch.equal(dx, native_vendor.product(dy, weight)), "two runs differ"


def test_what_is_widened(isa):
    for rows in (native_vendor._MIN_ROWS, 1000):
        assert not native_vendor.widens(torch.float32, rows)
        assert native_vendor.widens(torch.bfloat16, rows) == (native._X86 and isa != "avx512bf16")
    assert not native_vendor.widens(torch.bfloat16, native_vendor._MIN_ROWS - 1)


def test_scratch_of_inference_serves_training(monkeypatch):
    """A scratch that inference mode made could not be written to outside of it."""
    monkeypatch.setattr(native_vendor, "widens", lambda *args, **options: True)
    native_vendor._buffers.__dict__.clear()
    weight = torch.randn(8, 64).half()
    with torch.inference_mode():
        native_vendor.linear(torch.randn(20, 64).half(), weight, None)
        native_vendor.product(torch.randn(20, 8).half(), weight)
    x, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((20, 64), (4, 64), (8, 4)))
    with pk.use_backend("native"):
        pk.functional.lora_linear(x.half(), weight, A, B).float().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("rows", [20, 200])
def test_autocast_leaves_the_products_in_float32(monkeypatch, rows):
    monkeypatch.setattr(native_vendor, "widens", lambda *args, **options: True)
    x, weight, dy = (torch.randn(*shape).bfloat16() for shape in ((rows, 64), (8, 64), (rows, 8)))
    expected = native_vendor.linear(x, weight, None), native_vendor.product(dy, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = native_vendor.linear(x, weight, None), native_vendor.product(dy, weight)
    assert all(map(torch.equal, actual, expected))
