"""IA³, BitFit and scale-bias layers on Triton: the column pass, the scaled result, every gradient."""

import pytest
import torch
from test_scaled_linear import METHODS, Case
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels import use_backend
from peft_kernels.ops.scaled_linear.triton_columns import columns
from peft_kernels.testing import assert_within_budget

__all__ = ["seed"]  # fixtures

# M, K, N: one row, odd sizes with blocks that straddle rows, a split over rows, decode + vendor GEMM
SHAPES = {"one-row": (1, 64, 96), "odd": (5, 33, 7), "split": (70, 128, 80), "vendor": (530, 64, 48)}
DTYPES = {f"{str(half)[6:]}-float32": (half, torch.float32) for half in HALVES}
DTYPES |= {"float32": (torch.float32, torch.float32)}


def on_device(case):
    """The case's tensors where the kernels run."""
    for name in ("x", "dy", "bias", "scale", "weight"):
        setattr(case, name, getattr(case, name).to(DEVICE))
    return case


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_against_float64(method, shape, quantized, dtypes, poison):
    case = on_device(Case(method, shape, dtypes, quantized, zeros=True))
    with use_backend("triton"):
        case.check()
        first, again = case.run(case.function), case.run(case.function)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 96), (9, 64, 70)], ids=["one-row", "odd-N"])
@pytest.mark.parametrize("method", ["ia3", "ia3-feedforward"])
def test_inference(method, shape, dtypes, poison):
    case = on_device(Case(method, shape, dtypes, True))
    results = []
    for backend, dtype in (("triton", None), ("reference", torch.float64), ("reference", None)):
        with use_backend(backend):
            results.append(case.function(*(t.to(dtype or t.dtype) for t in (case.x, case.scale, case.bias))))
    assert_within_budget(*results)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (300, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_column_pass(shape, dtype, poison):
    u, v = (randn(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]] for _ in range(2))
    scale = randn(shape[1])
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    sums, products = columns(u, times=v, scale=scale, out=out, sums=True)
    assert torch.equal(out, (u * scale).to(dtype))
    assert_within_budget(sums, u.double().sum(0), u.float().sum(0))
    assert_within_budget(products, (u.double() * v.double()).sum(0), (u.float() * v.float()).sum(0))
    columns(u, scale=scale, out=u)
    assert torch.equal(u, out)
