"""The fused 4-bit linear kernels at every instruction-set level, against float64 over the same decoded weight."""

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import Weight4bit, native
from peft_kernels.ops.nf4.native_calls import native_weight
from peft_kernels.testing import assert_within_budget

core = native.load()
if core is None:
    pytest.skip(native.why_not(), allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 25, 33, 64, 100, 256, 300]
GUARD = 5  # columns between the rows of an output that must stay untouched


def rand(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(n, k, quant_type="nf4", blocksize=64, nested=True):
    w = rand(n, k, seed=n * 1000 + k, dtype=torch.bfloat16) / 8
    return Weight4bit.quantize(w, quant_type=quant_type, blocksize=blocksize, double_quant=nested)


def guarded(rows, columns, dtype):
    """A NaN-filled (rows, columns) view of a wider buffer, and a check that the rest of the buffer is still NaN."""
    buffer = torch.full((rows, columns + GUARD), float("nan"), dtype=dtype)

    def check():
        assert buffer[:, columns:].isnan().all(), "columns beyond the output were written"

    return buffer[:, :columns], check


def strided(x):
    """The same values with rows further apart than their length, NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def forward(x, weight, bias=None, terms=()):
    y, check = guarded(x.shape[0], weight.shape[0], x.dtype)
    core.linear_4bit_forward(
        x.data_ptr(),
        native.dtype_code(x.dtype),
        x.shape[0],
        x.stride(0),
        native_weight(weight),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else native.dtype_code(bias.dtype),
        [(s.data_ptr(), s.stride(0), b.data_ptr(), native.dtype_code(b.dtype), b.shape[1], a) for s, b, a in terms],
        y.data_ptr(),
        y.stride(0),
    )
    check()
    return y


def backward(dy, weight, terms=()):
    dx, check = guarded(dy.shape[0], weight.shape[1], dy.dtype)
    core.linear_4bit_backward(
        dy.data_ptr(),
        native.dtype_code(dy.dtype),
        dy.shape[0],
        dy.stride(0),
        native_weight(weight),
        [
            (t.data_ptr(), t.stride(0), a.data_ptr(), native.dtype_code(a.dtype), a.shape[0], p, seed)
            for t, a, p, seed in terms
        ],
        dx.data_ptr(),
        dx.stride(0),
    )
    check()
    return dx


def supported(direction, x, weight):
    ask = core.linear_4bit_forward_supported if direction is forward else core.linear_4bit_backward_supported
    return ask(native.dtype_code(x.dtype), x.shape[0], weight.shape[1], weight.blocksize)


def check_forward(x, weight, bias=None, terms=()):
    if not supported(forward, x, weight):
        with pytest.raises(ValueError, match="linear_4bit_forward"):
            forward(x, weight, bias, terms)
        return
    w = weight.dequantize(x.dtype)
    expected = x.double() @ w.double().T
    # A single column is a dot product to torch, which some machines sum in more lanes than any matrix product.
    second = int(w.shape[0] == 1)
    eager_bias = None if bias is None else F.pad(bias.to(x.dtype), (0, second))
    eager = F.linear(x, F.pad(w, (0, 0, 0, second)), eager_bias)[:, : w.shape[0]]
    if bias is not None:
        expected += bias.double()
    for s, b, scaling in terms:
        expected += scaling * s.double() @ b.double().T
        eager = eager + F.linear(s.to(x.dtype), b.to(x.dtype)) * scaling
    y = forward(strided(x), weight, bias, terms)
    assert_within_budget(y, expected, eager, "y")
    assert torch.equal(y, forward(x, weight, bias, terms)), "two runs differ"


def check_backward(dy, weight, terms=(), masks=()):
    if not supported(backward, dy, weight):
        with pytest.raises(ValueError, match="linear_4bit_backward"):
            backward(dy, weight, terms)
        return
    w = weight.dequantize(dy.dtype)
    expected, eager = dy.double() @ w.double(), dy @ w
    for (t, a, _, _), mask in zip(terms, masks, strict=True):
        expected += mask * (t.double() @ a.double())
        eager = eager + mask.to(dy.dtype) * (t.to(dy.dtype) @ a.to(dy.dtype))
    dx = backward(strided(dy), weight, terms)
    assert_within_budget(dx, expected, eager, "dx")
    assert torch.equal(dx, backward(dy, weight, terms)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(1, 64), (7, 128), (16, 192), (33, 576), (64, 64), (96, 128), (193, 2112)])
def test_shapes(isa, dtype, n, k):
    weight = make_weight(n, k)
    for m in ROWS:
        check_forward(rand(m, k, seed=m, dtype=dtype), weight)
        check_backward(rand(m, n, seed=m, dtype=dtype), weight)


def test_long_sums_are_carried_across_panels(isa):
    weight = make_weight(65, 6208)
    for m in (3, 40):
        check_forward(rand(m, 6208, seed=m, dtype=torch.bfloat16), weight)
    weight = make_weight(4163, 64)
    for m in (3, 40):
        check_backward(rand(m, 4163, seed=m, dtype=torch.bfloat16), weight)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
# Of one row by 9 columns the draw decides: 5 to 6 of 100 are beyond the budget at any instruction set.
@pytest.mark.parametrize("n, k, blocksize", [(33, 576, 64), (40, 640, 128), (17, 8192, 4096), (73, 1024, 1024)])
def test_formats(isa, n, k, blocksize, quant_type, nested):
    weight = make_weight(n, k, quant_type, blocksize, nested)
    for dtype in DTYPES:
        for m in (1, 6, 33):
            check_forward(rand(m, k, seed=m, dtype=dtype), weight)
            check_backward(rand(m, n, seed=m, dtype=dtype), weight)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(isa, dtype, bias_dtype):
    weight = make_weight(83, 192)
    for m in (1, 4, 16, 31):
        check_forward(rand(m, 192, seed=m, dtype=dtype), weight, rand(83, seed=1, dtype=bias_dtype))


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(1,), (3,), (16,), (17, 64), (256, 1, 16)], ids=str)
def test_lora_terms(isa, ranks, adapter_dtype):
    n, k = 83, 192
    weight = make_weight(n, k)
    for dtype in DTYPES:
        for m in (1, 4, 9, 31):
            left = rand(m, sum(ranks), seed=m) / 4  # every term reads its columns of one matrix, as the callers have it
            columns = left.split(list(ranks), dim=1)
            right = [rand(n, r, seed=r, dtype=adapter_dtype) / 4 for r in ranks]
            terms = [(s, b, 0.5 + i) for i, (s, b) in enumerate(zip(columns, right, strict=True))]
            check_forward(rand(m, k, seed=m, dtype=dtype), weight, rand(n, seed=2), terms)
            right = [rand(r, k, seed=r, dtype=adapter_dtype) / 4 for r in ranks]
            terms = [(t, a, 0.0, 0) for t, a in zip(columns, right, strict=True)]
            check_backward(rand(m, n, seed=m, dtype=dtype), weight, terms, [torch.ones(m, k)] * len(ranks))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_of_the_terms(isa, p):
    from peft_kernels.dropout import scale_mask

    n, k, seeds = 33, 576, [2**63 + 12345, 7]
    weight = make_weight(n, k)
    for m in (1, 5, 40):
        dy = rand(m, n, seed=m, dtype=torch.bfloat16)
        terms = [
            (rand(m, 16, seed=s % 100), rand(16, k, seed=1), drop, s) for s, drop in zip(seeds, (p, 0.0), strict=True)
        ]
        masks = [scale_mask(torch.tensor(s - 2**64 if s >= 2**63 else s), m, k, drop) for (_, _, drop, s) in terms]
        check_backward(dy, weight, terms, masks)


def test_threads_do_not_change_the_result(threads):
    weight = make_weight(333, 576)
    for m in (1, 5, 16, 33, 200):
        x, dy = rand(m, 576, seed=m, dtype=torch.bfloat16), rand(m, 333, seed=m, dtype=torch.bfloat16)
        check_forward(x, weight)
        check_backward(dy, weight)
        if supported(forward, x, weight):
            y, dx = forward(x, weight), backward(dy, weight) if supported(backward, dy, weight) else None
            torch.set_num_threads(1)
            assert torch.equal(y, forward(x, weight))
            assert dx is None or torch.equal(dx, backward(dy, weight))
            torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(isa, value):
    weight = make_weight(83, 192)
    for direction, columns in ((forward, 192), (backward, 83)):
        for m in (3, 13, 40):
            x = rand(m, columns, seed=m, dtype=torch.bfloat16)
            if not supported(direction, x, weight):
                continue
            clean = direction(x, weight)
            x[1, columns - 1] = value
            dirty = direction(x, weight)
            w = weight.dequantize(torch.bfloat16)
            eager = x @ (w.T if direction is forward else w)
            assert torch.equal(dirty[1].isfinite(), eager[1].isfinite())
            others = [i for i in range(m) if i != 1]
            assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_without_a_finite_scale(isa, dtype, bits):
    """Whatever digits a NaN has: rounding a table as integers must not carry them into a number."""
    weight = make_weight(83, 192, nested=False)
    weight.absmax[4] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # row 1, columns 64 to 127
    dense = weight.dequantize(dtype)
    assert dense.isfinite().logical_not().sum() >= 60
    for m in (1, 2, 3, 4, 5, 8, 9, 40):
        x, dy = rand(m, 192, seed=m, dtype=dtype), rand(m, 83, seed=m, dtype=dtype)
        if supported(forward, x, weight):
            assert torch.equal(forward(x, weight).isfinite(), (x @ dense.T).isfinite())
        if supported(backward, dy, weight):
            assert torch.equal(backward(dy, weight).isfinite(), (dy @ dense).isfinite())


@pytest.mark.parametrize("n, k, blocksize", [(8, 96, 64), (8, 64, 32), (8, 100, 64), (4, 192, 128)])
def test_layouts_it_refuses(n, k, blocksize):
    weight = make_weight(n, k, blocksize=blocksize)
    for m in (1, 40):
        x, dy = rand(m, k, seed=1, dtype=torch.bfloat16), rand(m, n, seed=1, dtype=torch.bfloat16)
        assert not supported(forward, x, weight) and not supported(backward, dy, weight)
        check_forward(x, weight)
        check_backward(dy, weight)


def test_bad_arguments():
    weight = make_weight(8, 64)
    view, x, y = (
        native_weight(weight),
        torch.zeros(2, 64, dtype=torch.bfloat16),
        torch.zeros(2, 8, dtype=torch.bfloat16),
    )
    s, b = torch.zeros(2, 4), torch.zeros(8, 4)
    good = dict(
        x=x.data_ptr(), dtype=2, M=2, ldx=64, weight=view, bias=0, bias_dtype=0, terms=[], y=y.data_ptr(), ldy=8
    )
    core.linear_4bit_forward(**{**good, "M": 0})
    term = (s.data_ptr(), 4, b.data_ptr(), 0, 4, 1.0)
    for bad in (
        {"x": 0},
        {"y": 0},
        {"M": -1},
        {"ldx": 63},
        {"ldy": 7},
        {"dtype": 3},
        {"bias_dtype": -1},
        {"terms": [(0, *term[1:])]},
        {"terms": [(*term[:3], 5, *term[4:])]},
        {"terms": [(*term[:4], 0, 1.0)]},
        {"terms": [(*term[:4], 5, 1.0)]},
    ):
        with pytest.raises(ValueError):
            core.linear_4bit_forward(**{**good, **bad})
    good = dict(dy=y.data_ptr(), dtype=2, M=2, ldy=8, weight=view, terms=[], dx=x.data_ptr(), ldx=64)
    term = (s.data_ptr(), 4, b.data_ptr(), 0, 4, 0.0, 0)
    for bad in ({"dy": 0}, {"dx": 0}, {"M": -1}, {"ldy": 7}, {"ldx": 63}, {"terms": [(*term[:5], 1.5, 0)]}):
        with pytest.raises(ValueError):
            core.linear_4bit_backward(**{**good, **bad})
