"""ia3_linear, bitfit_linear, scale_bias_linear: forward and every gradient against float64, and what they save."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import dispatch, native
from peft_kernels.testing import assert_within_budget

OP = "scaled_linear"
# M, K, N: one row, primes, non-multiples of 64, blocks that straddle rows, each side of every cross-over, a real layer
SHAPES = {
    "one-row": (1, 64, 64),
    "primes": (7, 128, 13),
    "straddling": (3, 96, 50),
    "odd": (5, 33, 7),
    "large": (300, 128, 80),
    "smollm2-down": (64, 1536, 576),
}
# dtypes of the activations, and of the vectors that are trained
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
}
METHODS = ("ia3", "ia3-feedforward", "bitfit", "scale-bias")


def call(namespace, method, x, weight, scale, bias):
    """The method's function of `namespace`."""
    if method == "bitfit":
        return namespace.bitfit_linear(x, weight, bias)
    if method == "scale-bias":
        return namespace.scale_bias_linear(x, weight, scale, bias)
    return namespace.ia3_linear(x, weight, scale, bias=bias, is_feedforward=method == "ia3-feedforward")


class Case:
    """One call: its arguments, and the call in three arithmetics."""

    def __init__(self, method, shape, dtypes, quantized, zeros=False):
        m, k, n = shape
        activation, trained = dtypes
        torch.manual_seed(m * k + n)
        w = torch.randn(n, k) / k**0.5
        self.method = method
        self.weight = pk.Weight4bit.quantize(w) if quantized else w.to(activation)
        self.x, self.dy = torch.randn(m, k).to(activation), torch.randn(m, n).to(activation)
        self.bias = torch.randn(n).to(trained)
        self.scale = (1 + torch.randn(k if method == "ia3-feedforward" else n) / 2).to(trained)
        if zeros:
            self.scale[::3] = 0

    def function(self, x, scale, bias, namespace=pk.functional):
        weight = self.weight if isinstance(self.weight, pk.Weight4bit) else self.weight.to(x.dtype)
        return call(namespace, self.method, x, weight, scale, bias)

    def run(self, function, cast=lambda t: t):
        """y and every gradient, by name."""
        tensors = {"x": self.x, "bias": self.bias} | ({} if self.method == "bitfit" else {"scale": self.scale})
        leaves = {name: cast(t).detach().requires_grad_() for name, t in tensors.items()}
        y = function(leaves["x"], leaves.get("scale"), leaves["bias"])
        gradients = torch.autograd.grad(y, list(leaves.values()), cast(self.dy))
        return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}

    def check(self, function=None):
        """Everything within the error budget."""
        reference = functools.partial(self.function, namespace=pk.reference)
        ours, eager = self.run(function or self.function), self.run(reference)
        truth = self.run(reference, lambda t: t.double())
        for name, value in ours.items():
            assert_within_budget(value, truth[name], eager[name], name)
            assert value.abs().max() > 0, name


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_against_float64(backend, method, shape, quantized, dtypes):
    Case(method, shape, dtypes, quantized).check()


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("method", ["ia3", "ia3-feedforward", "scale-bias"])
def test_zero_scales_are_exact(backend, method, quantized):
    """A column that is switched off still learns: its gradient is not Y / l."""
    case = Case(method, (70, 128, 48), DTYPES["bfloat16-float32"], quantized, zeros=True)
    case.check()
    results = case.run(case.function)
    assert results["dscale"][::3].abs().min() > 0
    off = results["dx" if method == "ia3-feedforward" else "y"][:, ::3]
    assert torch.equal(off, torch.zeros_like(off))


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
def test_several_adapters_multiply(backend, is_feedforward):
    method = "ia3-feedforward" if is_feedforward else "ia3"
    case = Case(method, (33, 128, 48), DTYPES["bfloat16-float32"], True, zeros=True)
    features = case.scale.shape[0]
    shape = (1, features) if is_feedforward else (features, 1)
    vectors = [case.scale.view(shape), torch.randn(shape), torch.rand(shape) + 0.5]
    results = []
    for namespace, cast in (
        (pk.functional, lambda t: t),
        (pk.reference, torch.Tensor.double),
        (pk.reference, lambda t: t),
    ):
        leaves = [cast(v).clone().requires_grad_() for v in vectors]
        x = cast(case.x).clone().requires_grad_()
        y = namespace.ia3_linear(x, case.weight, leaves, is_feedforward=is_feedforward)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *leaves], cast(case.dy))])
    for i, (ours, truth, eager) in enumerate(zip(*results, strict=True)):
        assert_within_budget(ours, truth, eager, f"result {i}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", ["x", "scale", "bias", "weight"])
def test_only_what_needs_a_gradient(backend, method, wanted):
    case = Case(method, (7, 128, 13), DTYPES["float32"], False)
    if wanted == "scale" and method == "bitfit":
        pytest.skip("BitFit has no scale")
    leaves = {"x": case.x, "weight": case.weight, "scale": case.scale, "bias": case.bias}
    leaves[wanted].requires_grad_()
    gradients = []
    for namespace in (pk.functional, pk.reference):
        call(namespace, method, **leaves).backward(case.dy)
        gradients.append(leaves[wanted].grad)
        leaves[wanted].grad = None
    torch.testing.assert_close(*gradients)
    assert all(t.grad is None for t in leaves.values())


@pytest.mark.parametrize("method", METHODS)
def test_saves_no_more_than_it_needs(backend, method):
    """The unscaled output, or x itself; for a bias alone nothing of the activations' size; never float32."""
    if backend == "reference":
        pytest.skip("the reference path saves what torch saves")
    case = Case(method, (64, 256, 96), DTYPES["bfloat16-float32"], True)

    def large(train_scale):
        saved = []
        x, bias = case.x.clone().requires_grad_(), case.bias.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            case.function(x, case.scale.clone().requires_grad_(train_scale), bias)
        activations = [t for t in saved if t.ndim == 2 and t.shape[0] == 64]
        return [t for t in activations if t.data_ptr() != x.data_ptr()], len(activations)

    own, count = large(True)
    assert count == (0 if method == "bitfit" else 1)
    assert [t.dtype for t in own] == ([torch.bfloat16] if method in ("ia3", "scale-bias") else [])
    assert large(False) == ([], 0)


@pytest.mark.parametrize("dtypes", [DTYPES["bfloat16"], DTYPES["bfloat16-float32"]], ids=["bfloat16", "float32 bias"])
@pytest.mark.parametrize("m", [5, 8192])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("multiplies", [True, False], ids=["half", "no-half"])
@pytest.mark.parametrize("method", METHODS)
def test_auto_leaves_to_torch_what_torch_does_as_well(monkeypatch, method, multiplies, quantized, m, dtypes):
    """A dense weight's bias, or few elements to scale; not a bias whose gradient torch would round to x's dtype, nor
    many rows in a half precision that the processor does not multiply."""
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(method, (m, 128, 96), dtypes, quantized)
    monkeypatch.setattr(native, "multiplies", lambda dtype: multiplies)
    vendor = not quantized and dtypes[0] is dtypes[1] and ((method == "bitfit" and multiplies) or m == 5)
    text = pk.explain(case.function, case.x, case.scale, case.bias)
    assert text.startswith(f"{OP}: {'reference' if vendor else 'native'}")
    with pk.use_backend("native"):
        assert pk.explain(case.function, case.x, case.scale, case.bias) == f"{OP}: native"
    case.check()


@pytest.mark.parametrize("method", METHODS)
def test_leading_dimensions_strides_and_no_rows(backend, method):
    case = Case(method, (24, 128, 32), DTYPES["bfloat16"], True)
    run = functools.partial(case.function, scale=case.scale, bias=case.bias)
    expected = run(case.x)
    assert torch.equal(run(case.x.view(2, 3, 4, 128)).view(24, 32), expected)
    assert torch.equal(run(case.x.t().contiguous().t()), expected)
    assert torch.equal(run(torch.cat([case.x, case.x], 1)[:, :128]), expected)
    assert run(case.x[0]).shape == (32,)
    x = torch.empty(2, 0, 128, dtype=torch.bfloat16, requires_grad=True)
    bias, scale = case.bias.clone().requires_grad_(), case.scale.clone().requires_grad_()
    y = run(x, scale=scale, bias=bias)
    y.sum().backward()
    assert y.shape == (2, 0, 32) and x.grad.shape == x.shape and torch.equal(bias.grad, torch.zeros_like(bias))
    assert method == "bitfit" or torch.equal(scale.grad, torch.zeros_like(scale))


@pytest.mark.parametrize("method", METHODS)
def test_no_columns(backend, method):
    case = Case(method, (3, 0, 8), DTYPES["float32"], False)
    ours, expected = case.run(case.function), case.run(functools.partial(case.function, namespace=pk.reference))
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name])


@pytest.mark.parametrize("method", METHODS)
def test_result_may_be_changed_in_place(backend, method):
    case = Case(method, (4, 64, 8), DTYPES["float32"], True)
    plain = case.run(lambda *args: case.function(*args).view(2, 2, 8).relu().view(4, 8))
    changed = case.run(lambda *args: case.function(args[0].view(2, 2, 64), *args[1:]).relu_().view(4, 8))
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


@pytest.mark.parametrize("method", METHODS)
def test_expanded_gradient(backend, method):
    case = Case(method, (24, 128, 32), DTYPES["float32"], True)
    case.dy = torch.ones(1, 1).expand(24, 32)
    case.check()


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_agree_bitwise_and_under_checkpointing(backend, method):
    case = Case(method, SHAPES["large"], DTYPES["bfloat16-float32"], True)
    first, again = case.run(case.function), case.run(case.function)
    recomputed = case.run(lambda *args: checkpoint(case.function, *args, use_reentrant=False))
    for name in first:
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], recomputed[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 300])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_stay_where_they_belong(backend, method, m, value):
    case = Case(method, (m, 256, 96), DTYPES["bfloat16"], True)
    case.x[1, 3] = value
    case.dy[1, 5] = value
    ours, expected = case.run(case.function), case.run(functools.partial(case.function, namespace=pk.reference))
    for name in ours:
        assert torch.equal(torch.isfinite(ours[name]), torch.isfinite(expected[name])), name


@pytest.mark.parametrize("method", METHODS)
def test_autocast(backend, method):
    case = Case(method, (5, 128, 32), DTYPES["float32"], False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.function(case.x, case.scale, case.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), case.function(case.x, case.scale, case.bias), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_library_ops(method, quantized):
    case = Case(method, (5, 128, 32), DTYPES["bfloat16-float32"], quantized)
    if reason := dispatch.why_not(OP, "native", case.x.device, ()):
        pytest.skip(reason)
    base = (case.weight.parts(), case.weight.meta()) if quantized else ([case.weight], [])
    scale, feedforward = None if method == "bitfit" else case.scale, method == "ia3-feedforward"
    ops, keep = torch.ops.peft_kernels, scale is not None and not feedforward
    forward = (case.x, *base, case.bias, scale, feedforward, keep, "native")
    torch.library.opcheck(ops.scaled_linear_forward.default, forward)
    saved = case.x if feedforward else ops.scaled_linear_forward(*forward)[1] if keep else None
    needs = [True, True, scale is not None]
    torch.library.opcheck(
        ops.scaled_linear_backward.default, (case.dy, saved, *base, scale, feedforward, needs, "native")
    )


@pytest.mark.parametrize("method", METHODS)
def test_direct_call_agrees_with_the_library_op(backend, method):
    """With leading dimensions and PEFT's vectors (n, 1), (1, n); the profiler sees the op, which goes another way."""
    case = Case(method, (24, 128, 32), DTYPES["bfloat16-float32"], True)
    case.x, case.dy = case.x.view(2, 3, 4, 128), case.dy.view(2, 3, 4, 32)
    case.scale = case.scale.view((1, -1) if method == "ia3-feedforward" else (-1, 1))
    direct = case.run(case.function)
    with torch.profiler.profile() as profile:
        observed = case.run(case.function)
    assert all(torch.equal(direct[name], observed[name]) for name in direct)
    seen = {event.key for event in profile.key_averages()}
    assert backend == "reference" or {f"peft_kernels::{OP}_{way}" for way in ("forward", "backward")} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compile(backend, method):
    case = Case(method, (33, 192, 70), DTYPES["bfloat16-float32"], True)
    case.check(torch.compile(case.function, fullgraph=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    torch.manual_seed(0)
    weight = pk.Weight4bit.quantize(torch.randn(6, 64))
    features = 64 if method == "ia3-feedforward" else 6
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 64), (features,), (6,))]
    leaves = [leaves[0], leaves[2]] if method == "bitfit" else leaves

    def function(x, *vectors):
        return call(pk.reference, method, x, weight, vectors[0], vectors[-1])

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_meta_tensors(method, quantized):
    """Shapes and dtypes without memory, as eager torch gives them."""
    case = Case(method, (6, 64, 8), (torch.bfloat16, torch.float32), quantized)
    x, weight, scale, bias = (t.to("meta") for t in (case.x, case.weight, case.scale, case.bias))
    y = call(pk.functional, method, x.view(2, 3, 64), weight, scale, bias)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 8), torch.bfloat16)


class TestCompositions:
    """With other methods on the same layer, the result is the composition of the references."""

    @pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
    def test_lora_and_ia3(self, backend, quantized):
        """l * (x W^T + b + s x A^T B^T): the scale goes into the layer, and into the rows of B."""
        case = Case("ia3", (33, 128, 48), DTYPES["float32"], quantized)
        lora_A, lora_B = torch.randn(4, 128) / 11, torch.randn(48, 4)

        def composed(namespace, x, scale, a, b):
            weight = case.weight if quantized else case.weight.to(x.dtype)
            delta = namespace.lora_linear(x, weight, a, b, scaling=0.5) - namespace.bitfit_linear(
                x, weight, torch.zeros(48, dtype=x.dtype)
            )
            return namespace.ia3_linear(x, weight, scale, bias=case.bias.to(x.dtype)) + scale * delta

        def both(x, scale, a, b):
            weight = case.weight if quantized else case.weight.to(x.dtype)
            return scale * pk.reference.lora_linear(x, weight, a, b, scaling=0.5, bias=case.bias.to(x.dtype))

        results = []
        for function, dtype in ((functools.partial(composed, pk.functional), None), (both, torch.float64)):
            leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (case.x, case.scale, lora_A, lora_B)]
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, case.dy.to(y.dtype))])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())

    def test_two_layers_of_an_mlp(self, backend):
        """The output scale of one layer equals the input scale of the next."""
        case = Case("ia3", (9, 128, 64), DTYPES["float32"], False)
        second = torch.randn(32, 64)
        one = pk.functional.bitfit_linear(
            pk.functional.ia3_linear(case.x, case.weight, case.scale), second, torch.zeros(32)
        )
        hidden = case.x @ case.weight.t()
        two = pk.functional.ia3_linear(hidden, second, case.scale, is_feedforward=True)
        torch.testing.assert_close(one, two)


class TestModuleErrors:
    """The modules' constructors refuse what their forward could only fail on."""

    LAYERS = pytest.mark.parametrize("cls", [pk.nn.IA3Linear, pk.nn.BitFitLinear, pk.nn.ScaleBiasLinear])

    @LAYERS
    def test_packed_weights_are_not_taken_for_dense_ones(self, cls, packed_layer):
        match = rf"(base_layer|linear): .*a dense weight, got {type(packed_layer).__name__}.*from_bnb"
        with pytest.raises(TypeError, match=match):
            cls.from_linear(packed_layer)

    @LAYERS
    def test_other_things(self, cls):
        with pytest.raises(TypeError, match=r"(base_layer|linear): expected nn.Linear.*got int"):
            cls.from_linear(3)
        for other in (3, torch.nn.Linear(64, 32)):
            with pytest.raises(TypeError, match=r"layer: expected a bitsandbytes.nn.Linear4bit, got (int|Linear)\."):
                cls.from_bnb(other)

    @pytest.mark.parametrize("cls", [pk.nn.BitFitLinear, pk.nn.ScaleBiasLinear])
    def test_shapes(self, cls):
        for weight in (torch.randn(4, 8), pk.Weight4bit.quantize(torch.randn(4, 8))):
            with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(5,\)"):
                cls(weight, torch.randn(5))
        with pytest.raises(TypeError, match="bias: expected a torch.Tensor, got float"):
            cls(torch.randn(4, 8), 0.5)
        with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(4,\)"):
            cls(torch.randn(4))


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy; nothing runs."""

    def call(self, function="ia3_linear", **changes):
        arguments = {"x": torch.randn(2, 64), "weight": torch.randn(32, 64), "bias": torch.randn(32)}
        if function != "bitfit_linear":
            arguments["scale"] = torch.ones(32)
        return getattr(pk.functional, function)(**arguments | changes)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"weight": "w"}, TypeError, r"weight: expected a torch.Tensor or a Weight4bit, got str"),
            ({"weight": torch.randn(32, 64).bfloat16()}, ValueError, r"weight: expected dtype torch.float32.*Cast"),
            ({"x": torch.randn(2, 60)}, ValueError, r"x: expected shape \(..., 64\), got \(2, 60\)"),
            ({"bias": torch.randn(31)}, ValueError, r"bias: expected shape \(32,\), got \(31,\)"),
            ({"scale": torch.ones(64)}, ValueError, r"scale: expected shape \(32,\) or \(32, 1\), got \(64,\)"),
            ({"scale": torch.ones(1, 32)}, ValueError, r"scale: expected shape .*scales the output.*is_feedforward"),
            (
                {"scale": [torch.ones(32), torch.ones(64)]},
                ValueError,
                r"scale\[1\]: expected shape \(32,\) or \(32, 1\), got \(64,\)",
            ),
            ({"scale": []}, ValueError, r"scale: expected at least one vector, got none"),
            ({"scale": [1.0]}, TypeError, r"scale\[0\]: expected a torch.Tensor, got float"),
            ({"scale": torch.ones(32, device="meta")}, ValueError, r"scale: expected device cpu.*got meta"),
            ({"scale": torch.ones(32, dtype=torch.int64)}, ValueError, r"scale: expected a floating-point tensor"),
            ({"is_feedforward": True}, ValueError, r"scale: expected shape \(64,\) or \(1, 64\), got \(32,\)"),
            ({"function": "bitfit_linear", "bias": None}, TypeError, r"bias: expected a torch.Tensor, got NoneType"),
            ({"function": "scale_bias_linear", "scale": torch.ones(31)}, ValueError, r"scale: expected shape \(32,\)"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_message(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)

    def test_named_backend_never_falls_back(self):
        with pk.use_backend("native"), pytest.raises(pk.BackendError, match=r"native.*scaled_linear.*use_backend"):
            self.call(scale=torch.ones(32, dtype=torch.float64))
