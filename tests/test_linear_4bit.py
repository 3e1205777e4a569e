"""linear_4bit: forward and every gradient against float64, and the contract around them."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.testing import assert_within_budget

OP = "linear_4bit"
# M, K, N: one row, primes, non-multiples of 64, blocks that straddle rows, each side of every cross-over, a real layer
SHAPES = {
    "one-row": (1, 64, 64),
    "decode": (4, 576, 192),
    "primes": (7, 128, 13),
    "straddling": (3, 96, 50),
    "odd": (5, 33, 7),
    "middle": (33, 192, 70),
    "large": (300, 128, 80),
    "smollm2-down": (64, 1536, 576),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ops(TorchDispatchMode):
    """The names of the operations that torch's dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def gradients(function, x, weight, bias, dy):
    """y, dx and dbias of one call."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, bias), dy)


def inputs(shape, dtype, quant_type="nf4", double_quant=True, blocksize=64):
    m, k, n = shape
    torch.manual_seed(m * k + n)
    w = pk.Weight4bit.quantize(
        torch.randn(n, k) / k**0.5, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize
    )
    return torch.randn(m, k).to(dtype), w, torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)


def check(x, weight, bias, dy):
    """Forward and gradients within the error budget."""
    ours = gradients(pk.functional.linear_4bit, x, weight, bias, dy)
    truth = gradients(pk.reference.linear_4bit, x.double(), weight, bias.double(), dy.double())
    eager = gradients(pk.reference.linear_4bit, x, weight, bias, dy)
    for name, a, t, e in zip(("y", "dx", "dbias"), ours, truth, eager, strict=True):
        assert_within_budget(a, t, e, name)
        assert a.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, shape, dtype):
    check(*inputs(shape, dtype))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("m", [1, 40])
def test_formats(backend, m, quant_type, double_quant, blocksize):
    check(*inputs((m, 192, 48), torch.bfloat16, quant_type, double_quant, blocksize))


def test_leading_dimensions_and_strides(backend):
    x, w, bias, _ = inputs((24, 128, 32), torch.bfloat16)
    expected = pk.functional.linear_4bit(x, w, bias)
    assert torch.equal(pk.functional.linear_4bit(x.view(2, 3, 4, 128), w, bias).view(24, 32), expected)
    columns = x.t().contiguous().t()
    assert torch.equal(pk.functional.linear_4bit(columns, w, bias), expected)
    wide = torch.randn(24, 256, dtype=x.dtype)
    wide[:, :128] = x
    assert torch.equal(pk.functional.linear_4bit(wide[:, :128], w, bias), expected)
    assert pk.functional.linear_4bit(x[0], w, bias).shape == (32,)


def test_expanded_gradient(backend):
    x, w, bias, _ = inputs((24, 128, 32), torch.float32)
    x.requires_grad_()
    pk.functional.linear_4bit(x, w, bias).sum().backward()
    expected = torch.ones(24, 32) @ w.dequantize(torch.float32)
    torch.testing.assert_close(x.grad, expected)


def test_no_rows(backend):
    _, w, bias, _ = inputs((1, 64, 32), torch.float32)
    x = torch.empty(2, 0, 64, requires_grad=True)
    bias.requires_grad_()
    y = pk.functional.linear_4bit(x, w, bias)
    y.sum().backward()
    assert y.shape == (2, 0, 32) and x.grad.shape == x.shape and torch.equal(bias.grad, torch.zeros(32))


def test_no_bias_and_bias_of_another_dtype(backend):
    x, w, bias, _ = inputs((5, 128, 32), torch.bfloat16)
    zero = pk.functional.linear_4bit(x, w, torch.zeros_like(bias))
    assert torch.equal(pk.functional.linear_4bit(x, w), zero)
    wider = [pk.functional.linear_4bit(x, w, bias.to(dtype)) for dtype in (torch.float32, torch.float64)]
    assert wider[0].dtype == torch.bfloat16 and torch.equal(*wider)


@pytest.mark.parametrize("m", [1, 20, 300])
def test_two_runs_agree_bitwise(backend, m):
    x, w, bias, dy = inputs((m, 256, 96), torch.bfloat16)
    first = gradients(pk.functional.linear_4bit, x, w, bias, dy)
    again = gradients(pk.functional.linear_4bit, x, w, bias, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 20, 300])
def test_nan_and_inf_stay_in_their_row(backend, m, value):
    x, w, bias, _ = inputs((m, 256, 96), torch.bfloat16)
    x[1, 3] = value
    y, expected = pk.functional.linear_4bit(x, w, bias), pk.reference.linear_4bit(x, w, bias)
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
    assert torch.equal(torch.isnan(y), torch.isnan(expected))


def test_saves_only_the_packed_weight(backend):
    if backend == "reference":
        pytest.skip("the reference path saves what torch saves")
    x, w, bias, _ = inputs((16, 256, 64), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.functional.linear_4bit(x.requires_grad_(), w, bias)
    assert sum(t.numel() * t.element_size() for t in saved) <= w.nbytes


def test_autocast(backend):
    x, w, bias, _ = inputs((5, 128, 32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.functional.linear_4bit(x, w, bias).dtype == torch.bfloat16


def test_whoever_observes_sees_one_library_op(backend):
    if backend == "reference":
        pytest.skip("the reference path has no library op")
    x, w, bias, dy = inputs((5, 128, 32), torch.bfloat16)
    direct = gradients(pk.functional.linear_4bit, x, w, bias, dy)
    with Ops() as seen:
        observed = gradients(pk.functional.linear_4bit, x, w, bias, dy)
    assert [name for name in seen.names if "peft_kernels" in name] == [
        "peft_kernels.linear_4bit_forward.default",
        "peft_kernels.linear_4bit_backward.default",
    ]
    assert all(torch.equal(a, b) for a, b in zip(direct, observed, strict=True))
    with torch.profiler.profile() as profile:
        pk.functional.linear_4bit(x, w)
    assert "peft_kernels::linear_4bit_forward" in {event.name for event in profile.events()}


def test_fake_tensors(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, bias, _ = inputs((5, 128, 32), torch.bfloat16)
    if backend == "reference":
        pytest.skip("the reference path is torch's own operations")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert pk.functional.linear_4bit(fake, w, bias).shape == (5, 32)
    assert type(pk.functional.linear_4bit(fake, w)) is type(fake)  # outside the mode: the tensor itself tells


def test_result_may_be_changed_in_place(backend):
    x, w, bias, _ = inputs((6, 128, 32), torch.bfloat16)
    x = x.view(2, 3, 128).requires_grad_()
    y = pk.functional.linear_4bit(x, w, bias)
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(y[1, 2], 2 * pk.functional.linear_4bit(x[1, 2], w, bias))
    assert y.shape == (2, 3, 32) and x.grad.shape == x.shape


def test_follows_the_memory_of_its_weight(backend):
    """The native core keeps pointers: a tensor that gets another storage must be noticed."""
    x, w, bias, _ = inputs((3, 128, 32), torch.bfloat16)
    _, other, _, _ = inputs((4, 128, 32), torch.bfloat16)
    pk.functional.linear_4bit(x, w, bias)
    for mine, new in zip(w.parts(), other.parts(), strict=True):
        mine.set_(new.clone())
    assert torch.equal(pk.functional.linear_4bit(x, w, bias), pk.functional.linear_4bit(x, other, bias))
    w.packed.fill_(0x77)  # in place: the memory is read at every call
    assert torch.equal(pk.functional.linear_4bit(x, w), pk.reference.linear_4bit(x, w))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), lambda w: w.to("cpu")])
def test_a_used_weight_can_be_copied(backend, duplicate):
    x, w, bias, _ = inputs((3, 128, 32), torch.bfloat16)
    expected = pk.functional.linear_4bit(x, w, bias)
    assert torch.equal(pk.functional.linear_4bit(x, duplicate(w), bias), expected)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_library_ops(double_quant):
    x, w, bias, dy = inputs((5, 128, 32), torch.bfloat16, double_quant=double_quant)
    if reason := dispatch.why_not(OP, "native", x.device, ()):
        pytest.skip(reason)
    ops = torch.ops.peft_kernels
    torch.library.opcheck(ops.linear_4bit_forward.default, (x, w.parts(), w.meta(), bias, "native"))
    torch.library.opcheck(ops.linear_4bit_backward.default, (dy, w.parts(), w.meta(), "native"))


@pytest.mark.slow
def test_compile(backend):
    x, w, bias, dy = inputs((5, 128, 32), torch.bfloat16)
    compiled = torch.compile(pk.functional.linear_4bit, fullgraph=True)
    ours, expected = gradients(compiled, x, w, bias, dy), gradients(pk.functional.linear_4bit, x, w, bias, dy)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    w = pk.Weight4bit.quantize(torch.randn(6, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: pk.reference.linear_4bit(x, w, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: pk.reference.linear_4bit(x, w, b), (x, bias))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_meta_tensors(double_quant):
    """Shapes and dtypes without memory, as eager torch gives them."""
    weight = pk.Weight4bit.quantize(torch.randn(8, 64), double_quant=double_quant).to("meta")
    x, bias = torch.empty(2, 3, 64, device="meta", dtype=torch.bfloat16), torch.empty(8, device="meta")
    y = pk.functional.linear_4bit(x, weight, bias)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 8), torch.bfloat16)


class TestModule:
    """pk.nn.Linear4bit."""

    def test_state_dict_round_trip(self, backend, tmp_path):
        from safetensors.torch import load_file, save_file

        source = pk.nn.Linear4bit.from_linear(torch.nn.Linear(96, 40))
        save_file(source.state_dict(), tmp_path / "layer.safetensors")
        target = pk.nn.Linear4bit.from_linear(torch.nn.Linear(96, 40))
        target.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        x = torch.randn(3, 96)
        assert torch.equal(source(x), target(x))

    def test_bitsandbytes_loads_our_state(self, backend):
        bnb = pytest.importorskip("bitsandbytes")
        ours = pk.nn.Linear4bit.from_linear(torch.nn.Linear(128, 32))
        state = {k.removeprefix("weight."): v for k, v in ours.state_dict().items() if k.startswith("weight.")}
        params = bnb.nn.Params4bit.from_prequantized(ours.state_dict()["weight"], state, device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(params.data, params.quant_state), ours.weight.dequantize())

    def test_loads_bitsandbytes_state(self, backend):
        bnb = pytest.importorskip("bitsandbytes")
        theirs = bnb.nn.Linear4bit(128, 32, quant_type="nf4").to("cpu")
        ours = pk.nn.Linear4bit.from_linear(torch.nn.Linear(128, 32))
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.weight.packed, theirs.weight.view(-1))
        assert set(ours.state_dict()) == set(theirs.state_dict())

    def test_cast_keeps_the_weight(self, backend):
        layer = pk.nn.Linear4bit.from_linear(torch.nn.Linear(128, 32))
        before = layer.weight.dequantize()
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.weight.dequantize(), before)

    @pytest.mark.parametrize("damage", ["json", "truncated", "missing", "wrong-shape"])
    def test_damaged_checkpoint(self, backend, damage):
        layer = pk.nn.Linear4bit.from_linear(torch.nn.Linear(128, 32))
        state, blob = layer.state_dict(), "weight.quant_state.bitsandbytes__nf4"
        if damage == "json":
            state[blob] = state[blob][:-5]
        elif damage == "truncated":
            state["weight"] = state["weight"][:-1]
        elif damage == "missing":
            del state["weight.absmax"]
        else:
            text = bytes(state[blob].tolist()).replace(b"128", b"-28")
            state[blob] = torch.tensor(list(text), dtype=torch.uint8)
        before = layer.weight
        with pytest.raises((ValueError, RuntimeError), match="weight|packed"):
            layer.load_state_dict(state)
        assert layer.weight is before


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy."""

    def setup_method(self):
        self.weight = pk.Weight4bit.quantize(torch.randn(32, 64))

    def test_weight(self):
        with pytest.raises(TypeError, match=r"weight: expected a Weight4bit, got Tensor. Make one"):
            pk.functional.linear_4bit(torch.randn(2, 64), torch.randn(32, 64))

    def test_width(self):
        with pytest.raises(ValueError, match=r"x: expected shape \(..., 64\), got \(2, 63\)"):
            pk.functional.linear_4bit(torch.randn(2, 63), self.weight)

    def test_integer_input(self):
        with pytest.raises(ValueError, match=r"x: expected a floating-point tensor, got torch.int64. Cast"):
            pk.functional.linear_4bit(torch.ones(2, 64, dtype=torch.int64), self.weight)

    def test_bias(self):
        with pytest.raises(ValueError, match=r"bias: expected shape \(32,\), got \(31,\)"):
            pk.functional.linear_4bit(torch.randn(2, 64), self.weight, torch.randn(31))

    def test_device(self):
        with pytest.raises(ValueError, match=r"weight: expected device meta.*got cpu. Move it"):
            pk.functional.linear_4bit(torch.randn(2, 64, device="meta"), self.weight)

    def test_named_backend_never_falls_back(self):
        x = torch.randn(2, 64, dtype=torch.float64)
        with pk.use_backend("native"), pytest.raises(pk.BackendError, match=r"native.*linear_4bit.*use_backend"):
            pk.functional.linear_4bit(x, self.weight)
