"""The column pass and the scales of the fused 4-bit kernels, at every instruction-set level and number of threads."""

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import Weight4bit, native
from peft_kernels.ops.linear_4bit import native_calls as base
from peft_kernels.ops.scaled_linear.native_calls import columns
from peft_kernels.testing import assert_within_budget

core = native.load()
if core is None:
    pytest.skip(native.why_not(), allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# rows and columns: each side of the cuts at 64 rows and 256 columns, of groups of 4 rows and of 16 lanes
SHAPES = [(1, 1), (3, 17), (4, 256), (63, 257), (64, 40), (65, 512), (203, 301), (512, 1030)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def matrix(m, n, dtype):
    """Rows further apart than their length, NaN between them."""
    wide = torch.full((m, n + 3), float("nan"), dtype=dtype)
    wide[:, :n] = torch.randn(m, n)
    return wide[:, :n]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pass(isa, shape, dtype):
    u, v, scale, out = matrix(*shape, dtype), matrix(*shape, dtype), torch.randn(shape[1]), matrix(*shape, dtype)
    out.fill_(float("nan"))
    sums, products = columns(u, times=v, scale=scale, out=out, sums=True)
    assert torch.equal(out, (u * scale).to(dtype))
    assert out.as_strided((shape[0],), (out.stride(0),), shape[1]).isnan().all(), "wrote past the row"
    for ours, terms in ((sums, (u.double(), u.float())), (products, (u.double() * v.double(), u.float() * v.float()))):
        assert_within_budget(ours, terms[0].sum(0), terms[1].sum(0))
    before, in_place = u.clone(), u
    columns(u, scale=scale, out=in_place)
    assert torch.equal(u, (before * scale).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(isa, dtype, value):
    u, scale = matrix(70, 33, dtype), torch.randn(33)
    u[66, 5] = value
    scale[7] = value
    out = torch.empty_like(u)
    sums, products = columns(u, times=u, scale=scale, out=out, sums=True)
    torch.testing.assert_close(out, (u * scale).to(dtype), equal_nan=True)
    assert (~torch.isfinite(sums)).nonzero().tolist() == (~torch.isfinite(products)).nonzero().tolist() == [[5]]


def test_threads_and_runs_agree_bitwise():
    u, v = torch.randn(1000, 700).bfloat16(), torch.randn(1000, 700).bfloat16()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(columns(u, times=v, sums=True))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_no_rows():
    sums, products = columns(torch.empty(0, 9), times=torch.empty(0, 9), sums=True)
    assert not sums.any() and not products.any()


def test_refuses_nonsense():
    u = torch.randn(4, 8)
    call = lambda *tail: core.scale_and_sum_columns(u.data_ptr(), 0, *tail)  # noqa: E731
    for tail, message in (
        ((-1, 8, 8, 0, 0, 0, 0, 0, 0, 0), "must not be negative"),
        ((4, 8, 7, 0, 0, 0, 0, 0, 0, 0), "u: the row stride"),
        ((4, 8, 8, 0, 0, 0, 0, 0, 0, u.data_ptr()), "v must not be null"),
        ((4, 8, 8, 0, 0, 0, u.data_ptr(), 8, 0, 0), "out needs a scale"),
    ):
        with pytest.raises(ValueError, match=f"scale_and_sum_columns: .*{message}"):
            call(*tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 24, 25, 100])
@pytest.mark.parametrize(("n", "k"), [(70, 192), (128, 2112)], ids=["70x192", "128x2112"])
def test_scales_inside_the_fused_kernels(isa, m, n, k, dtype):
    weight = Weight4bit.quantize(torch.randn(n, k) / 8)
    w, scale, bias = weight.dequantize(dtype), torch.randn(n), torch.randn(n)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    if base.fused_forward(m, dtype, weight):
        unscaled = torch.full((m, n), float("nan"), dtype=dtype)
        y = base.forward_fused(x, weight, bias, [], scale, unscaled)
        exact = F.linear(x.double(), w.double(), bias.double())
        eager = F.linear(x, w, bias.to(dtype))
        assert_within_budget(unscaled, exact, eager, "unscaled")
        assert_within_budget(y, exact * scale.double(), (eager * scale).to(dtype), "y")
        assert torch.equal(unscaled, base.forward_fused(x, weight, bias, []))
        assert torch.equal(y, base.forward_fused(x, weight, bias, [], scale))
    if base.fused_backward(m, dtype, weight):
        dx = base.backward_fused(dy, weight, [], scale)
        exact = (dy.double() * scale.double()) @ weight.dequantize(torch.float32).double()
        assert_within_budget(dx, exact, (dy * scale).to(dtype) @ w, "dx")
