"""The native bottleneck adapter at every instruction set of this machine and with any number of threads."""

import dataclasses

import pytest
import torch
from test_bottleneck_adapter import BF16, FP16, FP32, Case

import peft_kernels as pk
from peft_kernels import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or "")


CASES = {
    "everything": Case(26, 150, 20, 70, scaling="all", residual="other", dropout_p=0.3),
    "whole-tiles": Case(18, 192, 64),
    "inner-270": Case(14, 128, 270, norm=False),
    "tall": Case(700, 70, 9),
    "wide": Case(8, 1100, 8, mean=3.0),
}


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(isa, case, dtypes):
    dataclasses.replace(case, dtype=dtypes[0], parameters=dtypes[1]).check()


def test_thread_count_does_not_matter(isa):
    before, results = torch.get_num_threads(), []
    case = Case(301, 256, 24, dtype=BF16, scaling="all", dropout_p=0.1)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(case.run(pk.functional.bottleneck_adapter))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


BAD = {
    "null x": ({"x": (0, 0, 8)}, "x is null"),
    "stride": ({"x": (1, 0, 7)}, "row stride 7"),
    "dtype": ({"x": (1, 3, 8)}, "dtype code 3"),
    "null y": ({"y": 0}, "y is null"),
    "negative": ({"M": -1}, "negative size"),
}


@pytest.mark.parametrize("changed, message", BAD.values(), ids=BAD)
def test_bad_arguments(changed, message):
    x, down, up, y = torch.randn(5, 8), torch.randn(4, 8), torch.randn(8, 4), torch.full((5, 8), float("nan"))
    matrix = lambda t: (t.data_ptr(), 0, t.stride(0))  # noqa: E731
    adapter = (matrix(down), matrix(up), 4, 8, 8, [(0, 0)] * 6, 1.0, 1, 0.0, 0, False)
    arguments = {
        "adapter": adapter, "x": matrix(x), "M": 5, "ln_eps": 1e-5, "residual": (0, 0, 0), "y": y.data_ptr(),
        "y_dtype": 0, "z": 0, "z_dtype": 0, "stats": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        native.load().bottleneck_forward(**arguments | changed)
    assert y.isnan().all()
