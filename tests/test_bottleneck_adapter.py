"""bottleneck_adapter: forward and every gradient against float64, its options, its module, bad input."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.ops.bottleneck_adapter.activations import _ALIASES, ACTIVATIONS
from peft_kernels.testing import assert_within_budget

OP = "bottleneck_adapter"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass
class Case:
    """One call: M, K, r, N, the dtypes of x and of the parameters, and options; run in three arithmetics."""

    m: int
    k: int
    r: int
    n: int = 0  # K
    dtype: torch.dtype = FP32
    parameters: torch.dtype | None = None  # x's
    others: torch.dtype | None = None  # of layer norm, residual and gate: the parameters'
    activation: str = "silu"  # smooth: where a tiny Z takes the other sign, a jump in act' is no rounding error
    scaling: str = "constant"  # learned, channel, gate, all
    residual: str = "x"  # none, other
    norm: bool = True
    bias: bool = True
    dropout_p: float = 0.0
    mean: float = 0.0
    seed: int = 0

    def __post_init__(self):
        torch.manual_seed(self.m * self.k + self.r + self.seed)
        k, r, n = self.k, self.r, self.n or self.k
        parameters = self.parameters or self.dtype
        batch = (self.m // 3, 3) if self.m % 3 == 0 and self.m else (1, self.m)
        x = torch.randn(*batch, k) * (1 + 0.5 * torch.rand(k)) + self.mean
        stream = self.others if self.others and self.residual == "other" else self.dtype
        self.dy = torch.randn(*batch, n).to(stream)
        leaves = {
            "x": x.to(self.dtype),
            "down_weight": (torch.randn(r, k) / k**0.5).to(parameters),
            "up_weight": (torch.randn(n, r) / r**0.5).to(parameters),
        }
        if self.bias:
            leaves |= {"down_bias": torch.randn(r).to(parameters), "up_bias": torch.randn(n).to(parameters)}
        if self.norm:
            leaves["ln_weight"] = (1 + 0.3 * torch.randn(k)).to(parameters)
            if self.bias:
                leaves["ln_bias"] = torch.randn(k).to(parameters)
        if self.residual == "other":
            leaves["residual"] = torch.randn(*batch, n).to(self.dtype)
        factors = {"learned": torch.full((1,), 0.7), "channel": torch.rand(n) + 0.5, "gate": torch.rand(batch[0], 1, 1)}
        for name in factors:
            if self.scaling in (name, "all"):
                leaves[name] = factors[name].to(parameters)
        for name in ("ln_weight", "ln_bias", "residual", "gate"):
            if self.others and name in leaves:
                leaves[name] = leaves[name].to(self.others)
        self.leaves = leaves

    def call(self, function, leaves):
        """The function on these leaves."""
        arguments = dict.fromkeys(("down_bias", "up_bias")) | leaves
        factors = [arguments.pop(name) for name in ("learned", "channel", "gate") if name in arguments]
        if self.residual == "x":
            arguments["residual"] = arguments["x"]
        torch.manual_seed(7)
        return function(
            **arguments, scaling=[0.5, *factors] if factors else 0.5, activation=self.activation,
            dropout_p=self.dropout_p,
        )  # fmt: skip

    def run(self, function, cast=lambda t: t):
        """y and every gradient, by name."""
        leaves = {name: cast(t).detach().requires_grad_() for name, t in self.leaves.items()}
        y = self.call(function, leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), cast(self.dy))
        return {"y": y.detach(), **{f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}}

    def draws(self):
        """Fewer for a case that has many elements in every result; of a single hidden unit, all share one error."""
        return 60 if self.r == 1 else max(3, min(20, 200 // self.m))

    def check(self, function=pk.functional.bottleneck_adapter, peer=pk.reference.bottleneck_adapter):
        """Everything within the error budget, over several draws: the error of a lone scalar is luck."""
        draws = [dataclasses.replace(self, seed=seed) for seed in range(self.draws())]
        ours, eager, truth = [], [], []
        for case in draws:
            ours.append(case.run(function))
            eager.append(case.run(peer))
            truth.append(case.run(pk.reference.bottleneck_adapter, lambda t: t.double()))
        for name in ours[0]:
            value, exact, theirs = (torch.stack([draw[name] for draw in draws]) for draws in (ours, truth, eager))
            assert_within_budget(value, exact, theirs, name)
            assert value.abs().max() > 0, name
        return ours[0]


SHAPES = {
    "one-row": Case(1, 64, 8),
    "primes": Case(7, 131, 13, 61, residual="none"),
    "inner-1": Case(9, 48, 1, 50, residual="other"),
    "odd": Case(5, 33, 7, residual="other"),
    "inner-above-a-tile": Case(66, 96, 100, scaling="channel"),
    "inner-256": Case(20, 320, 256, residual="none"),
    "inner-600": Case(15, 70, 600),
    "many-rows": Case(300, 128, 16, scaling="channel"),
    "bert-base": Case(64, 768, 48),
    "parallel": Case(33, 192, 96, residual="none", norm=False),
}
DTYPES = {
    "float32": (FP32, FP32),
    "bfloat16": (BF16, BF16),
    "bfloat16-float32": (BF16, FP32),
    "float16": (FP16, FP16),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, case, dtypes):
    dataclasses.replace(case, dtype=dtypes[0], parameters=dtypes[1]).check()


OPTIONS = {
    "nothing": Case(12, 64, 8, norm=False, bias=False, residual="none"),
    "norm-without-biases": Case(12, 64, 8, bias=False),
    "norm-of-shifted-rows": Case(12, 256, 24, mean=20.0),
    "learned": Case(12, 64, 8, scaling="learned"),
    "gate": Case(12, 64, 8, scaling="gate", norm=False),
    "gate-without-bias": Case(12, 64, 8, scaling="gate", bias=False),
    "all-factors": Case(12, 64, 20, 70, scaling="all", residual="other"),
    "dropout": Case(21, 66, 8, dropout_p=0.4),
    "dropout-all-factors": Case(21, 130, 8, scaling="all", dropout_p=0.3, norm=False),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_options(backend, case, dtype):
    dataclasses.replace(case, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, dtype):
    Case(40, 64, 24, dtype=dtype, activation=activation, norm=False).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_extremes(backend, activation):
    """Where exponentials overflow and where derivatives jump: as torch has them."""
    values = torch.tensor([0.0, -0.0, 1e-20, 0.5, -0.5, 3.0, 6.0, 9.0, -9.0, 88.0, -88.0, 1e4, -1e4])
    results = []
    for function in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter):
        z = values[:, None].clone().requires_grad_()
        y = function(z, torch.ones(1, 1), None, torch.ones(1, 1), None, activation=activation)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), z)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-7)


def test_names_of_activations():
    x, down, up = torch.randn(3, 8), torch.randn(2, 8), torch.randn(8, 2)
    for alias, name in {**_ALIASES, "ReLU": "relu"}.items():
        results = [pk.functional.bottleneck_adapter(x, down, None, up, None, activation=a) for a in (alias, name)]
        assert torch.equal(*results)


def test_names_mean_what_transformers_means():
    get_activation = pytest.importorskip("transformers.activations").get_activation
    z = torch.randn(1000, dtype=torch.float64)
    for name in (*ACTIVATIONS, *_ALIASES):
        if name not in ("identity", "leakyrelu"):  # `adapters` names leaky_relu so
            try:
                theirs = get_activation({"gelu_tanh": "gelu_new"}.get(name, name))
            except KeyError:
                assert name == "gelu_accurate"
                continue
            ours = ACTIVATIONS[_ALIASES.get(name, name)](z)
            torch.testing.assert_close(ours, theirs(z), rtol=1e-6, atol=1e-6, msg=name)


def test_gradcheck():
    case = Case(6, 10, 3, 5, activation="gelu", scaling="all", residual="other", dropout_p=0.25)
    leaves = {name: t.double().requires_grad_() for name, t in case.leaves.items()}

    def function(*tensors):
        return case.call(pk.reference.bottleneck_adapter, dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


def test_other_mixtures_of_dtypes(backend):
    """Layer norm in float32 under a bfloat16 adapter; a float32 residual stream."""
    case = Case(12, 64, 8, dtype=BF16, others=FP32, residual="other", scaling="gate")
    assert case.check()["y"].dtype == torch.float32


def test_leading_dimensions_strides_and_no_rows(backend):
    case = Case(24, 128, 8, dtype=BF16, norm=True)
    expected = case.call(pk.functional.bottleneck_adapter, case.leaves)
    x = case.leaves["x"]
    for other in (x.reshape(24, 128), x.reshape(2, 3, 4, 128), x.reshape(24, 128).t().contiguous().t()):
        y = case.call(pk.functional.bottleneck_adapter, {**case.leaves, "x": other})
        assert y.shape == other.shape and torch.equal(y.reshape(expected.shape), expected)
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in case.leaves.items()}
    tolerance = {"rtol": 0.02, "atol": 0.02} if backend == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(case.call(pk.functional.bottleneck_adapter, strided), expected, **tolerance)
    empty = {**case.leaves, "x": torch.empty(0, 128, dtype=BF16)}
    leaves = {name: t.requires_grad_() for name, t in empty.items()}
    y = case.call(pk.functional.bottleneck_adapter, leaves)
    y.sum().backward()
    assert y.shape == (0, 128) and leaves["x"].grad.shape == (0, 128) and not leaves["down_weight"].grad.any()


NAMES = ["x", "down_weight", "down_bias", "up_weight", "up_bias", "ln_weight", "ln_bias", "channel", "gate", "residual"]


@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_needs_a_gradient(backend, wanted):
    case = Case(9, 40, 5, 30, scaling="all", residual="other")
    gradients = []
    for function in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter):
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in case.leaves.items()}
        case.call(function, leaves).backward(case.dy)
        assert all((t.grad is None) == (name != wanted) for name, t in leaves.items())
        gradients.append(leaves[wanted].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_saves_no_activation_but_x(backend, norm):
    if backend == "reference":
        pytest.skip("the reference path saves what torch saves")
    case = Case(66, 256, 8, dtype=BF16, dropout_p=0.5, norm=norm)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        leaves = {name: t.requires_grad_() for name, t in case.leaves.items()}
        case.call(pk.functional.bottleneck_adapter, leaves)
    large = [t for t in saved if t.numel() >= 66 * 256]
    assert [t.data_ptr() for t in large] == [leaves["x"].data_ptr()]


def test_two_runs_agree_bitwise_also_through_checkpointing(backend):
    case = Case(201, 130, 24, dtype=BF16, dropout_p=0.1, scaling="all", residual="x")
    first, again = case.run(pk.functional.bottleneck_adapter), case.run(pk.functional.bottleneck_adapter)
    assert all(torch.equal(first[name], again[name]) for name in first)
    recomputed = case.run(
        lambda **arguments: checkpoint(pk.functional.bottleneck_adapter, **arguments, use_reentrant=False)
    )
    assert all(torch.equal(first[name], recomputed[name]) for name in first)


def test_a_gradient_of_a_kernels_gradient_is_refused():
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(5, 64, 8)
    leaves = {name: t.requires_grad_() for name, t in case.leaves.items()}
    y = case.call(pk.functional.bottleneck_adapter, leaves)
    gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


def test_dropout_in_evaluation_and_of_everything(backend):
    case = Case(9, 64, 8, dtype=FP32)
    case.dropout_p = 1.0
    x = case.leaves["x"]
    assert torch.equal(case.call(pk.functional.bottleneck_adapter, case.leaves), x)
    evaluation = lambda **arguments: pk.functional.bottleneck_adapter(**arguments, training=False)  # noqa: E731
    y = case.call(evaluation, case.leaves)
    case.dropout_p = 0.0
    assert torch.equal(y, case.call(pk.functional.bottleneck_adapter, case.leaves))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_nonfinite_values_stay_in_their_row(backend, value, norm):
    case = Case(14, 70, 8, dtype=BF16, norm=norm)
    case.leaves["x"][0, 1, 69] = value
    ours, theirs = (case.run(f) for f in (pk.functional.bottleneck_adapter, pk.reference.bottleneck_adapter))
    for name in ("y", "d x"):
        assert torch.equal(ours[name].isfinite(), theirs[name].isfinite()), name


def test_autocast(backend):
    case = Case(12, 64, 8, residual="x")
    with torch.autocast("cpu", dtype=BF16):
        ours = case.run(pk.functional.bottleneck_adapter)
    assert ours["y"].dtype == ours["d x"].dtype == torch.float32  # the residual stream stays as it is
    truth = case.run(pk.reference.bottleneck_adapter)
    torch.testing.assert_close(ours["y"], truth["y"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_autocast_rounds_after_the_norm(backend, mean, dtype):
    """Against eager autocast, which takes the layer norm of the float32 x."""

    def autocast(function):
        def call(**arguments):
            with torch.autocast("cpu", dtype=dtype):
                return function(**arguments)

        return call

    functions = autocast(pk.functional.bottleneck_adapter), autocast(pk.reference.bottleneck_adapter)
    case = Case(12, 64, 8, mean=mean)
    case.check(*functions)
    dataclasses.replace(case, bias=False).check(*functions)
    assert dataclasses.replace(case, residual="none").call(functions[0], case.leaves).dtype == dtype


def test_meta_tensors():
    """Shapes and dtypes without memory, as eager torch gives them."""
    layer = pk.nn.BottleneckAdapter(
        64, 4, norm_before=True, use_gating=True, dropout=0.1, stochastic_depth=0.1, device="meta", dtype=BF16
    )
    y = layer(torch.empty(2, 3, 64, device="meta", dtype=BF16))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 64), BF16)
    case = Case(6, 64, 8, 50, dtype=BF16, residual="other", others=FP32, scaling="all", dropout_p=0.5)
    y = case.call(pk.functional.bottleneck_adapter, {name: t.to("meta") for name, t in case.leaves.items()})
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 50), FP32)


def test_library_ops():
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(10, 24, 4, 20, dtype=BF16, scaling="all")
    t = {name: value.reshape(-1, value.shape[-1]) if value.ndim > 2 else value for name, value in case.leaves.items()}
    gate = torch.rand(10, dtype=BF16)
    parameters = [t[n] for n in ("down_weight", "down_bias", "up_weight", "up_bias", "ln_weight", "ln_bias", "channel")]
    options = (False, "gelu", 0.5, 1e-5, 0.2, torch.tensor([3]))
    forward = torch.ops.peft_kernels.bottleneck_adapter_forward.default
    residual = torch.randn(10, 20)
    arguments = (t["x"], residual, *parameters, gate, *options, True, "native")
    torch.library.opcheck(forward, arguments)
    _, z, stats = forward(*arguments)
    backward = torch.ops.peft_kernels.bottleneck_adapter_backward.default
    dy = torch.randn(10, 20)
    for needs in ([True] * 9, [False] * 8 + [True]):
        torch.library.opcheck(backward, (dy, t["x"], z, stats, *parameters, gate, *options, BF16, needs, "native"))


def test_compile(backend):
    compiled = torch.compile(pk.functional.bottleneck_adapter, fullgraph=True, backend="aot_eager")
    Case(21, 64, 8, dtype=BF16, scaling="all", activation="gelu").check(compiled)


class TestModule:
    """pk.nn.BottleneckAdapter."""

    def test_names_and_starts(self):
        layer = pk.nn.BottleneckAdapter(
            32, 4, scaling="channel", norm_before=True, norm_after=True, use_gating=True, init_weights="mam_adapter"
        )
        linears = {f"{name}.{part}" for name in ("down", "up", "gate") for part in ("weight", "bias")}
        norms = {f"norm_{name}.{part}" for name in ("before", "after") for part in ("weight", "bias")}
        assert set(layer.state_dict()) == linears | norms | {"scaling"}
        assert not layer.up.weight.any() and layer.down.weight.any() and layer.scaling.shape == (32,)
        torch.manual_seed(0)
        for init, std in (("bert", 0.02), ("houlsby", 0.0088)):
            layer = pk.nn.BottleneckAdapter(400, 100, init_weights=init)
            assert abs(layer.down.weight.std() - std) < 1e-3 and abs(layer.up.weight.std() - std) < 1e-3
            assert not layer.down.bias.any() and not layer.up.bias.any()

    @pytest.mark.parametrize(
        "options",
        [{}, {"norm_before": True}, {"norm_after": True}, {"norm_after": True, "residual_before_norm": False},
         {"use_gating": True, "scaling": "channel"}, {"residual": False, "scaling": 4.0}, {"bias": False}],
        ids=str,
    )  # fmt: skip
    def test_is_its_parts(self, backend, options):
        torch.manual_seed(0)
        layer = pk.nn.BottleneckAdapter(32, 4, activation="tanh", **options)
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(2, 5, 32)
        h = x if layer.norm_before is None else layer.norm_before(x)
        expected = layer.up(torch.tanh(layer.down(h))) * layer.scaling
        if layer.gate is not None:
            expected = expected * torch.sigmoid(layer.gate(x)).mean(1)[:, None]
        if layer.residual and layer.residual_before_norm:
            expected = expected + x
        if layer.norm_after is not None:
            expected = layer.norm_after(expected)
        if layer.residual and not layer.residual_before_norm:
            expected = expected + x
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)

    def test_weights_that_are_no_plain_parameters(self):
        """Parametrized, pruned or given by functional_call: the module computes with what its attributes show."""
        torch.manual_seed(0)
        layer, x = pk.nn.BottleneckAdapter(32, 4, norm_before=True), torch.randn(5, 32)

        def expected():
            return x + layer.up(F.relu(layer.down(layer.norm_before(x))))

        before = layer(x)
        torch.nn.utils.parametrizations.weight_norm(layer.down)
        with torch.no_grad():
            layer.down.parametrizations.weight.original0.mul_(3)
        torch.nn.utils.prune.random_unstructured(layer.up, "weight", 0.5)
        torch.nn.utils.prune.random_unstructured(layer.norm_before, "bias", 0.5)
        torch.testing.assert_close(layer(x), expected(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(layer(x), before)
        bias = torch.randn(32)
        y = torch.func.functional_call(layer, {"up.bias": bias}, (x,))
        torch.testing.assert_close(y, expected() + bias, rtol=1e-4, atol=1e-4)

    def test_residual_given_apart(self, backend):
        torch.manual_seed(0)
        x, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        sequential, parallel = pk.nn.BottleneckAdapter.pfeiffer(32, 4), pk.nn.BottleneckAdapter.parallel(32, 4)
        torch.testing.assert_close(sequential(x, other), sequential(x) - x + other)
        torch.testing.assert_close(parallel(x), torch.zeros(2, 5, 32))
        torch.testing.assert_close(parallel(x, other), other)
        assert parallel.scaling == 4.0 and pk.nn.BottleneckAdapter.houlsby(32, 4).activation == "silu"

    def test_stochastic_depth_skips_samples(self, backend):
        torch.manual_seed(0)
        layer = pk.nn.BottleneckAdapter(32, 4, residual=False, stochastic_depth=0.5)
        x = torch.randn(40, 3, 32)
        whole = layer.eval()(x)
        y = layer.train()(x)
        skipped = (y == 0).all(-1).all(-1)
        assert 5 < skipped.sum() < 35
        torch.testing.assert_close(y[~skipped], 2 * whole[~skipped])
        layer.stochastic_depth = 1.0
        assert not layer(x).any()

    def test_repr_explain_and_errors(self):
        layer = pk.nn.BottleneckAdapter(32, 4, scaling="learned")
        assert "scaling=trained (1,)" in repr(layer)
        assert pk.explain(layer).startswith("bottleneck_adapter: ")
        with pytest.raises(ValueError, match=r"init_weights: expected one of \['bert'"):
            pk.nn.BottleneckAdapter(32, 4, init_weights="zeros")
        with pytest.raises(ValueError, match="scaling: expected a float, 'learned' or 'channel', got 'row'"):
            pk.nn.BottleneckAdapter(32, 4, scaling="row")
        with pytest.raises(ValueError, match="at least 1, got 32 and 0"):
            pk.nn.BottleneckAdapter(32, 0)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"dropout": 1.5}, ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
            ({"dropout": None}, TypeError, "dropout: expected a probability from 0 to 1, got NoneType"),
            ({"stochastic_depth": 1.5}, ValueError, "stochastic_depth: expected a probability from 0 to 1, got 1.5"),
            ({"stochastic_depth": -1.0}, ValueError, "stochastic_depth: expected a probability from 0 to 1, got -1.0"),
            ({"scaling": None}, TypeError, "scaling: expected a float, 'learned' or 'channel', got NoneType"),
            ({"scaling": True}, TypeError, "scaling: expected a float, 'learned' or 'channel', got bool"),
        ],
        ids=str,
    )
    def test_options_are_refused_at_construction(self, options, error, message):
        with pytest.raises(error, match=message):
            pk.nn.BottleneckAdapter(32, 4, **options)


BAD_INPUT = {
    "activation": ({"activation": "prelu"}, ValueError, r"activation: expected one of identity, relu.*got 'prelu'"),
    "no-name": ({"activation": torch.relu}, TypeError, "activation: expected a name, got builtin"),
    "x": ({"x": torch.randn(2, 60)}, ValueError, r"x: expected shape \(..., 64\), got \(2, 60\)"),
    "up": ({"up_weight": torch.randn(64, 5)}, ValueError, r"up_weight: expected shape \(64, 4\), got \(64, 5\)"),
    "down-bias": ({"down_bias": torch.randn(5)}, ValueError, r"down_bias: expected shape \(4,\), got \(5,\)"),
    "norm": ({"ln_weight": torch.randn(60)}, ValueError, r"ln_weight: expected shape \(64,\), got \(60,\)"),
    "norm-bias-alone": ({"ln_bias": torch.randn(64)}, ValueError, "ln_bias: expected None without ln_weight"),
    "residual": ({"residual": torch.randn(64)}, ValueError, r"residual: expected shape \(2, 64\), got \(64,\)"),
    "inner-0": (
        {"down_weight": torch.empty(0, 64), "up_weight": torch.empty(64, 0)},
        ValueError,
        "a bottleneck of at least 1",
    ),
    "dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability from 0 to 1, got -0.1"),
    "dropout-text": ({"dropout_p": "a"}, TypeError, "dropout_p: expected a probability from 0 to 1, got str"),
    "dropout-none": (
        {"dropout_p": None, "training": False},
        TypeError,
        "dropout_p: expected a probability from 0 to 1, got NoneType",
    ),
    "eps": ({"ln_eps": -5.0}, ValueError, "ln_eps: expected a number of at least 0, got -5.0"),
    "eps-nan": ({"ln_eps": float("nan")}, ValueError, "ln_eps: expected a number of at least 0, got nan"),
    "eps-text": ({"ln_eps": "a"}, TypeError, "ln_eps: expected a number of at least 0, got str"),
    "scaling-bool": ({"scaling": True}, TypeError, "scaling: expected a float, a tensor.*got bool"),
    "scaling-bool-in-a-list": ({"scaling": [1.0, True]}, TypeError, "scaling: expected a float, a tensor.*got bool"),
    "scaling-shape": ({"scaling": torch.ones(3)}, ValueError, r"scaling: expected 1 or N elements.*got \(3,\)"),
    "scaling-kind": ({"scaling": "learned"}, TypeError, "scaling: expected a float, a tensor"),
    "integers": ({"down_weight": torch.ones(4, 64, dtype=torch.int8)}, ValueError, "down_weight: .*int8.*Cast"),
    "device": ({"up_bias": torch.empty(64, device="meta")}, ValueError, "up_bias: expected device cpu"),
}


@pytest.mark.parametrize("changes, error, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(changes, error, message):
    """Each error names the argument, what was expected, what came and the remedy; nothing runs."""
    arguments = {
        "x": torch.randn(2, 64),
        "down_weight": torch.randn(4, 64),
        "down_bias": None,
        "up_weight": torch.randn(64, 4),
        "up_bias": None,
    }
    with pytest.raises(error, match=message):
        pk.functional.bottleneck_adapter(**arguments | changes)
