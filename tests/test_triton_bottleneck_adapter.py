"""Bottleneck adapters on Triton: forward and every gradient, the fused kernels and the path for wide bottlenecks."""

import dataclasses

import pytest
import torch
from test_bottleneck_adapter import FP32, NAMES, Case
from triton_support import DEVICE, HALVES, Traffic, seed

import peft_kernels as pk
from peft_kernels.ops.bottleneck_adapter.activations import ACTIVATIONS
from peft_kernels.ops.bottleneck_adapter.triton_columns import column_products
from peft_kernels.ops.bottleneck_adapter.triton_kernels import backward, forward
from peft_kernels.testing import assert_within_budget
from peft_kernels.triton_common import interpreting
from peft_kernels.triton_common.lowrank import LowRank, expand_add

__all__ = ["seed"]  # fixtures

HALF = HALVES[-1]


@pytest.fixture(autouse=True)
def triton():
    """Nothing falls back."""
    with pk.use_backend("triton"):
        yield


class OnDevice(Case):
    """A case whose tensors lie where the kernels run."""

    def __post_init__(self):
        super().__post_init__()
        self.leaves = {name: t.to(DEVICE) for name, t in self.leaves.items()}
        self.dy = self.dy.to(DEVICE)

    def draws(self):
        """The interpreter is slow: as few as leave the largest error of a result no luck."""
        if self.m > 100 or self.k > 500 or (self.r > 256 and self.m > 16):
            return 1
        one_number = self.m == 1 or (self.m < 16 and self.scaling in ("learned", "all"))
        return 60 if self.r == 1 else 20 if one_number else 4


CASES = {
    "one-row": OnDevice(1, 64, 8),
    "primes": OnDevice(67, 131, 13, 61, residual="none"),
    "inner-1": OnDevice(6, 16, 1, 20, residual="other", scaling="gate"),
    "bert-base": OnDevice(70, 768, 48, norm=False),
    "inner-256": OnDevice(66, 70, 256, 40, residual="none"),
    "inner-300": OnDevice(66, 70, 300, scaling="channel", dropout_p=0.3),
    "inner-300-factors": OnDevice(9, 64, 300, scaling="all"),
    "everything": OnDevice(70, 150, 20, 70, scaling="all", residual="other", dropout_p=0.3),
    "without-biases": OnDevice(66, 64, 8, bias=False, scaling="gate"),
    "nothing": OnDevice(66, 64, 8, norm=False, bias=False, residual="none"),
    "shifted-rows": OnDevice(30, 256, 24, mean=20.0),
    "split-rows": OnDevice(530, 64, 8, dropout_p=0.5),
    "learned": OnDevice(9, 64, 8, scaling="learned"),
}
DTYPES = {f"{str(half)[6:]}": (half, half) for half in HALVES}
DTYPES |= {"float32": (FP32, FP32), f"{str(HALF)[6:]}-float32": (HALF, FP32)}
# Dtypes by case for the slow interpreter: what a dtype changes (pieces of a product, roundings, tiles) is met in each
# of the kernels (fused, with one tile of the rank and with several, and wide), once with every option.
INTERPRETED = {
    "one-row": [0],
    "primes": [1],
    "inner-1": [2],
    "bert-base": [0],
    "inner-256": [0, 1],
    "inner-300": [0, 1],
    "inner-300-factors": [0, 1],
    "everything": [0, 1, 2],
    "without-biases": [1],
    "nothing": [0],
    "shifted-rows": [0, 1],
    "split-rows": [0],
    "learned": [2],
}
DTYPE_IDS = list(DTYPES)
RUNS = [
    pytest.param(case, DTYPES[ids], id=f"{name}-{ids}")
    for name, case in CASES.items()
    for ids in ([DTYPE_IDS[i] for i in INTERPRETED[name]] if interpreting() else DTYPE_IDS)
]


@pytest.mark.parametrize("case, dtypes", RUNS)
def test_against_float64(case, dtypes, poison):
    case = dataclasses.replace(case, dtype=dtypes[0], parameters=dtypes[1])
    first, again = case.check(), case.run(pk.functional.bottleneck_adapter)
    assert all(torch.equal(first[name], again[name]) for name in first), "two runs differ"


def test_float32_residual_stream(poison):
    case = OnDevice(66, 64, 8, dtype=HALF, others=FP32, residual="other", scaling="gate")
    assert case.check()["y"].dtype == torch.float32


# rows whose statistics change as their columns come, 64 or 16 at a time
UNEVEN = {
    "first-tile-apart": lambda x: x[..., :64].add_(20.0),
    "last-tile-apart": lambda x: x[..., 128:].sub_(20.0),
    "equal-at-first": lambda x: x[..., :64].fill_(3.0),
    "one-outlier": lambda x: x[..., 5].fill_(500.0),
    "tiny": lambda x: x.mul_(1e-5),
    "large": lambda x: x.mul_(5e3),
    "far-from-zero": lambda x: x.add_(200.0),
}


@pytest.mark.parametrize("dtype", [HALF, FP32], ids=str)
@pytest.mark.parametrize("change", UNEVEN.values(), ids=UNEVEN)
def test_norm_of_uneven_rows(change, dtype, poison):
    """In one pass the product is taken around the mean so far."""
    case = OnDevice(36, 150, 8, dtype=dtype, scaling="learned")
    change(case.leaves["x"])
    reference = pk.reference.bottleneck_adapter
    eager, exact = case.run(reference), case.run(reference, lambda t: t.double())
    ours = case.run(pk.functional.bottleneck_adapter)
    for name in ("y", "d x", "d down_weight"):
        assert_within_budget(ours[name], exact[name], eager[name], name)


@pytest.mark.parametrize("std, upstream", [(0.003, 300.0), (300.0, 1e-4)])
def test_norm_of_rows_far_from_one(std, upstream, poison):
    """What comes from above, over a row's std, need not fit into float16."""
    case = OnDevice(36, 150, 8, dtype=torch.float16, residual="none")
    case.leaves["x"].mul_(std), case.dy.mul_(upstream)
    reference = pk.reference.bottleneck_adapter
    eager, exact = case.run(reference), case.run(reference, lambda t: t.double())
    ours = case.run(pk.functional.bottleneck_adapter)
    for name in ("d down_weight", "d down_bias", "d ln_weight", "d ln_bias"):
        assert_within_budget(ours[name], exact[name], eager[name], name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, poison):
    OnDevice(66, 32, 24, activation=activation, norm=False).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_extremes(activation):
    """Where exponentials overflow and where derivatives jump: as torch has them."""
    values = [0.0, -0.0, 1e-20, 0.5, -0.5, 0.62, 0.64, 3.0, 6.0, 9.0, -9.0, 88.0, -88.0, 1e4, -1e4, float("nan")]
    results = []
    for function in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter):
        z = torch.tensor(values, device=DEVICE)[:, None].requires_grad_()
        one = torch.ones(1, 1, device=DEVICE)
        y = function(z, one, None, one, None, activation=activation)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), z)))
    (ours, our_slope), (theirs, their_slope) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(our_slope[:-1], their_slope[:-1], rtol=1e-6, atol=2e-7)


# of the wide kernels, what they compute themselves rather than column_products and sums, which both share
WANTED = [(name, 5) for name in NAMES] + [(name, 300) for name in ("x", "down_bias", "up_weight", "gate")]


@pytest.mark.parametrize("wanted, rank", WANTED)
def test_only_what_needs_a_gradient(wanted, rank, poison):
    case = OnDevice(9, 40, rank, 30, scaling="all", residual="other")
    gradients = []
    for function in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter):
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in case.leaves.items()}
        case.call(function, leaves).backward(case.dy)
        gradients.append(leaves[wanted].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_nonfinite_values_stay_in_their_row(value, norm):
    case = OnDevice(14, 70, 8, dtype=HALF, norm=norm)
    case.leaves["x"][0, 1, 69] = value
    ours, theirs = (case.run(f) for f in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter))
    for name in ("y", "d x"):
        assert torch.equal(ours[name].isfinite(), theirs[name].isfinite()), name


def test_strided_inputs(poison):
    case = OnDevice(24, 128, 8, dtype=HALF, scaling="all", residual="other")
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in case.leaves.items()}
    calls = (case.call(pk.functional.bottleneck_adapter, leaves) for leaves in (strided, case.leaves))
    assert torch.equal(*calls)


def test_column_products_drop_what_the_forward_pass_drops(poison):
    """The mask as the low-rank kernel, which serves wide bottlenecks, applies it."""
    key, rows, columns = torch.tensor([12345], device=DEVICE), 70, 130
    mask = torch.zeros(rows, columns, device=DEVICE)
    ones = torch.ones(rows, columns, device=DEVICE)
    expand_add(mask, LowRank(ones[:, :1], ones[:1], 1.0, 0.3, key))
    t, gate = torch.randn(rows, 5, device=DEVICE), torch.rand(rows, device=DEVICE)
    planes, sums, _ = column_products(ones, t, FP32, None, gate, 0.3, key)
    products, sums = planes.sum(0).t(), sums.sum(0)
    assert_within_budget(products, t.double().t() @ mask.double(), t.t() @ mask)
    assert_within_budget(sums, gate.double() @ mask.double(), gate @ mask)


def traffic_case(norm, added):
    """(tensors by name, the arguments that forward and backward share) of two programs, each of 64 rows or a part."""
    rows, k, rank, n = 70, 150, 20, 150
    shapes = {"x": (rows, k), "residual": (rows, n), "dy": (rows, n), "down": (rank, k), "up": (n, rank)}
    shapes |= {"down_bias": (rank,), "up_bias": (n,), "channel": (n,), "gate": (rows,)}
    shapes |= {"ln_weight": (k,), "ln_bias": (k,)} if norm else {}
    tensors = {name: torch.rand(shape, dtype=HALF) for name, shape in shapes.items()}
    if added != "other":
        del tensors["residual"]
    names = ("down", "down_bias", "up", "up_bias", "ln_weight", "ln_bias", "channel", "gate")
    return tensors, (*map(tensors.get, names), added == "x", "silu", 0.5, 1e-5, 0.0, None)


@pytest.mark.skipif(not interpreting(), reason="the interpreter tells what is accessed")
@pytest.mark.parametrize("added", ["none", "x", "other"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_forward_moves_every_byte_once(norm, added):
    """x once, and once more where it is the residual; y once; parameters once in each of the two programs.

    With layer norm these read what `fold_norm` makes of Wd, its bias and the norm's parameters.
    """
    tensors, shared = traffic_case(norm, added)
    rank, k = tensors["down"].shape
    with Traffic() as moved:
        y, z, stats = forward(tensors["x"], tensors.get("residual"), *shared, True)
    del tensors["dy"]
    expected = dict.fromkeys(tensors, 2) | {"gate": 1, "x": 2 if added == "x" else 1}
    expected |= {"residual": 1} if added == "other" else {}
    expected |= {"down_bias": 1, "ln_weight": 2 * rank, "ln_bias": rank} if norm else {}
    folded = rank * k + 3 * rank if norm else 0
    assert moved.times("loaded", **tensors) == expected | {"elsewhere": 2 * folded}
    results = {"y": y, "z": z} | ({"stats": stats} if norm else {})
    assert moved.times("stored", **results) == dict.fromkeys(results, 1) | {"elsewhere": folded}


@pytest.mark.skipif(not interpreting(), reason="the interpreter tells what is accessed")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_backward_reads_each_matrix_once_a_kernel(norm):
    """By rows: dY, and again where it is x's gradient too, and x for LN's; by columns: dY and x for the weights.

    A weight once in each of the two programs, and for the gradients of the channels' factors and of the norm.
    """
    tensors, shared = traffic_case(norm, "x")
    x, dy = tensors["x"], tensors["dy"]
    _, z, stats = forward(x, None, *shared, True)
    with Traffic() as moved:
        dx = backward(dy, x, z, stats, *shared, x.dtype, [True, *[True] * 4, *[norm] * 2, True, True])[0]
    expected = {"dy": 3, "x": 1 + norm, "z": 1, "down": 2 + 2 * norm, "up": 3}
    found = moved.times("loaded", **{name: tensors.get(name, z) for name in expected})
    del found["elsewhere"]  # the partial sums, and vectors
    assert found == expected
    assert moved.times("stored", dx=dx)["dx"] == 1
