"""lora_linear: forward and every gradient against float64, dropout, several adapters, modules, bad input."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.dropout import scale_mask
from peft_kernels.testing import assert_within_budget

OP = "lora_linear"
# M, K, N, ranks of the active adapters
SHAPES = {
    "one-row": (1, 64, 64, (8,)),
    "decode": (4, 576, 192, (16,)),
    "primes": (7, 128, 13, (3,)),
    "straddling": (3, 96, 50, (1,)),
    "odd": (5, 33, 7, (2,)),
    "two-adapters": (33, 192, 70, (4, 17)),
    "large": (300, 128, 80, (64,)),
    "widest-rank": (20, 320, 96, (256,)),
    "smollm2-down": (64, 1536, 576, (16,)),
}
# dtypes of the activations and of the adapters
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
}


class Case:
    """One call: its arguments, and the call in three arithmetics."""

    def __init__(self, shape, dtypes, quantized, dropout_p=0.0, lora_bias=False):
        m, k, n, ranks = shape
        activation, adapter = dtypes
        torch.manual_seed(m * k + n)
        w = torch.randn(n, k) / k**0.5
        self.weight = pk.Weight4bit.quantize(w) if quantized else w.to(activation)
        self.x = torch.randn(m, k).to(activation)
        self.dy = torch.randn(m, n).to(activation)
        self.bias = torch.randn(n).to(activation)
        self.lora_A = [(torch.randn(r, k) / k**0.5).to(adapter) for r in ranks]
        self.lora_B = [(torch.randn(n, r) / r**0.5).to(adapter) for r in ranks]
        self.lora_bias = [torch.randn(n).to(adapter) if lora_bias else None for _ in ranks]
        self.options = {"scaling": [0.5 + i for i in range(len(ranks))], "dropout_p": dropout_p}

    def run(self, function, cast=lambda t: t):
        """y and every gradient, by name."""
        leaves = [cast(t).detach().requires_grad_() for t in (self.x, self.bias, *self.lora_A, *self.lora_B)]
        x, bias, *adapters = leaves
        n = len(self.lora_A)
        biases = [None if b is None else cast(b).detach().requires_grad_() for b in self.lora_bias]
        weight = self.weight if isinstance(self.weight, pk.Weight4bit) else cast(self.weight)
        torch.manual_seed(7)
        y = function(x, weight, adapters[:n], adapters[n:], bias=bias, lora_bias=biases, **self.options)
        names = ["x", "bias", *(f"A{i}" for i in range(n)), *(f"B{i}" for i in range(n))]
        leaves += [b for b in biases if b is not None]
        names += [f"lora_bias{i}" for i, b in enumerate(biases) if b is not None]
        gradients = torch.autograd.grad(y, leaves, cast(self.dy))
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}

    def check(self, function=pk.functional.lora_linear):
        """Everything within the error budget."""
        ours = self.run(function)
        truth = self.run(pk.reference.lora_linear, lambda t: t.double())
        eager = self.run(pk.reference.lora_linear)
        for name, value in ours.items():
            assert_within_budget(value, truth[name], eager[name], name)
            assert value.abs().max() > 0, name


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, shape, quantized, dtypes):
    Case(shape, dtypes, quantized).check()


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("shape", ["one-row", "primes", "two-adapters", "large"])
def test_dropout_and_bias(backend, shape, quantized):
    Case(SHAPES[shape], DTYPES["bfloat16-float32"], quantized, dropout_p=0.3, lora_bias=True).check()


def test_dropout_per_adapter(backend):
    Case(SHAPES["two-adapters"], DTYPES["float32"], True, dropout_p=[0.0, 0.5]).check()


def test_everything_dropped(backend):
    case = Case(SHAPES["primes"], DTYPES["float32"], True, dropout_p=1.0)
    y = pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B, dropout_p=1.0)
    torch.testing.assert_close(y, pk.functional.linear_4bit(case.x, case.weight))


def test_dropout_repeats_under_seed_and_checkpointing(backend):
    case = Case(SHAPES["two-adapters"], DTYPES["float32"], True, dropout_p=0.4)
    first, again = case.run(pk.functional.lora_linear), case.run(pk.functional.lora_linear)
    assert all(torch.equal(first[name], again[name]) for name in first)
    through = lambda *args, **kwargs: checkpoint(pk.functional.lora_linear, *args, use_reentrant=False, **kwargs)  # noqa: E731
    recomputed = case.run(through)
    assert all(torch.equal(first[name], recomputed[name]) for name in first)
    torch.manual_seed(8)
    other = pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B, dropout_p=0.4)
    assert not torch.equal(other, pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B))


def test_no_dropout_in_evaluation(backend):
    case = Case(SHAPES["primes"], DTYPES["float32"], True)
    arguments = (case.x, case.weight, case.lora_A, case.lora_B)
    assert torch.equal(
        pk.functional.lora_linear(*arguments, dropout_p=0.5, training=False), pk.functional.lora_linear(*arguments)
    )


def test_mask_statistics():
    mask = scale_mask(torch.tensor(123456789012345), 400, 1003, 0.3)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs((mask == 0).double().mean().item() - 0.3) < 5 * (0.3 * 0.7 / mask.numel()) ** 0.5
    columns = (mask == 0).double().mean(0)
    assert (columns - 0.3).abs().max() < 5.5 * (0.3 * 0.7 / 400) ** 0.5


def test_single_adapter_without_a_sequence(backend):
    case = Case(SHAPES["decode"], DTYPES["bfloat16"], True)
    single = pk.functional.lora_linear(case.x, case.weight, case.lora_A[0], case.lora_B[0], scaling=0.5)
    listed = pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B, scaling=[0.5])
    assert torch.equal(single, listed)


def test_leading_dimensions_strides_and_no_rows(backend):
    case = Case((24, 128, 32, (4,)), DTYPES["bfloat16"], True)
    call = lambda x: pk.functional.lora_linear(x, case.weight, case.lora_A, case.lora_B)  # noqa: E731
    expected = call(case.x)
    assert torch.equal(call(case.x.view(2, 3, 4, 128)).view(24, 32), expected)
    assert torch.equal(call(case.x.t().contiguous().t()), expected)
    lora_A = [a.requires_grad_() for a in case.lora_A]
    empty = torch.empty(0, 128, dtype=torch.bfloat16, requires_grad=True)
    y = pk.functional.lora_linear(empty, case.weight, lora_A, case.lora_B)
    y.sum().backward()
    assert y.shape == (0, 32) and empty.grad.shape == (0, 128) and not lora_A[0].grad.any()


@pytest.mark.parametrize("wanted", ["x", "A", "B", "weight"])
def test_only_what_needs_a_gradient(backend, wanted):
    case = Case(SHAPES["primes"], DTYPES["float32"], False)
    leaves = {"x": case.x, "A": case.lora_A[0], "B": case.lora_B[0], "weight": case.weight}
    leaves[wanted].requires_grad_()
    y = pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B, scaling=0.5)
    y.backward(case.dy)
    ours = leaves[wanted].grad
    leaves[wanted].grad = None
    pk.reference.lora_linear(case.x, case.weight, case.lora_A, case.lora_B, scaling=0.5).backward(case.dy)
    torch.testing.assert_close(ours, leaves[wanted].grad)
    assert all(t.grad is None for name, t in leaves.items() if name != wanted)


def test_saves_no_mask_and_no_float32_input(backend):
    if backend == "reference":
        pytest.skip("the reference path saves what torch saves")
    case = Case((64, 256, 96, (8,)), DTYPES["bfloat16-float32"], True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_A = [a.requires_grad_() for a in case.lora_A]
        pk.functional.lora_linear(case.x.requires_grad_(), case.weight, lora_A, case.lora_B, dropout_p=0.5)
    activations = [t for t in saved if t.shape == case.x.shape]
    assert len(activations) == 1 and activations[0].data_ptr() == case.x.data_ptr()


def test_two_runs_agree_bitwise(backend):
    case = Case(SHAPES["large"], DTYPES["bfloat16-float32"], True, dropout_p=0.1)
    first, again = case.run(pk.functional.lora_linear), case.run(pk.functional.lora_linear)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_autocast(backend):
    case = Case((5, 128, 32, (4,)), DTYPES["float32"], False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.functional.lora_linear(case.x, case.weight, case.lora_A, case.lora_B).dtype == torch.bfloat16


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
def test_whoever_observes_sees_one_library_op(backend, quantized):
    if backend == "reference":
        pytest.skip("the reference path has no library op")
    case = Case(SHAPES["two-adapters"], DTYPES["bfloat16-float32"], quantized, dropout_p=0.3)
    direct = case.run(pk.functional.lora_linear)
    with torch.profiler.profile() as profile:
        observed = case.run(pk.functional.lora_linear)
    names = sorted(event.name for event in profile.events() if event.name.startswith("peft_kernels::"))
    assert names == ["peft_kernels::lora_linear_backward", "peft_kernels::lora_linear_forward"]
    assert all(torch.equal(direct[name], observed[name]) for name in direct)


def test_checkpoint_of_an_observed_forward(backend):
    """What is saved must not depend on who observes: the recomputation may run unobserved."""
    case = Case(SHAPES["primes"], DTYPES["float32"], True)
    x, lora_A = case.x.requires_grad_(), [a.requires_grad_() for a in case.lora_A]
    with torch.profiler.profile():
        y = checkpoint(pk.functional.lora_linear, x, case.weight, lora_A, case.lora_B, use_reentrant=False)
    y.backward(case.dy)
    assert all(a.grad.abs().max() > 0 for a in lora_A)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
def test_leading_dimensions_and_change_in_place(backend, quantized):
    case = Case((6, 128, 32, (4,)), DTYPES["bfloat16-float32"], quantized)
    flat = case.run(pk.functional.lora_linear)
    case.x, case.dy = case.x.view(2, 3, 128), case.dy.view(2, 3, 32)
    ours = case.run(lambda *args, **options: pk.functional.lora_linear(*args, **options).mul_(1))
    assert ours["y"].shape == (2, 3, 32) and ours["dx"].shape == (2, 3, 128)
    assert all(torch.equal(ours[name].flatten(), flat[name].flatten()) for name in flat)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
def test_library_ops(quantized):
    case = Case(SHAPES["two-adapters"], DTYPES["bfloat16"], quantized)
    if reason := dispatch.why_not(OP, "native", case.x.device, ()):
        pytest.skip(reason)
    parts, meta = (case.weight.parts(), case.weight.meta()) if quantized else ([case.weight], [])
    shared = (case.lora_A, case.lora_B, [0.5, 1.5], [0.0, 0.2], torch.tensor([3, 4]))
    forward = torch.ops.peft_kernels.lora_linear_forward.default
    torch.library.opcheck(forward, (case.x, parts, meta, case.bias, *shared, "native"))
    _, s = forward(case.x, parts, meta, case.bias, *shared, "native")
    backward = torch.ops.peft_kernels.lora_linear_backward.default
    torch.library.opcheck(backward, (case.dy, case.x, parts, meta, s, *shared, [True, True, True], "native"))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
def test_compile(backend, quantized):
    case = Case(SHAPES["two-adapters"], DTYPES["bfloat16"], quantized)
    case.check(torch.compile(pk.functional.lora_linear, fullgraph=True))


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_adapters(backend, rows, quantized):
    x, w, bias = torch.randn(rows, 64, requires_grad=True), torch.randn(8, 64), torch.randn(8)
    weight = pk.Weight4bit.quantize(w) if quantized else w
    y = pk.functional.lora_linear(x, weight, [], [], bias=bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.dequantize() if quantized else w, bias))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_scaling_may_be_tensors(backend):
    """As PEFT's are after `prepare_model_for_compiled_hotswap`; they may be trained, and compile."""
    x, w = torch.randn(3, 64), torch.randn(8, 64)
    a, b = [torch.randn(r, 64) for r in (2, 3)], [torch.randn(8, r) for r in (2, 3)]
    options = {"lora_bias": [torch.randn(8), None]}
    s = [torch.tensor(0.7, requires_grad=True), torch.tensor(1.3)]
    y = pk.functional.lora_linear(x, w, a, b, scaling=s, **options)
    torch.testing.assert_close(y, pk.functional.lora_linear(x, w, a, b, scaling=[0.7, 1.3], **options))
    y.sum().backward()
    torch.testing.assert_close(s[0].grad, (x @ a[0].T @ b[0].T + options["lora_bias"][0]).sum())
    compiled = torch.compile(pk.functional.lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, a, b, scaling=s, **options), y)


def test_gradcheck():
    torch.manual_seed(0)
    w = pk.Weight4bit.quantize(torch.randn(6, 64))
    shapes = ((3, 64), (2, 64), (6, 2), (6,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(x, a, b, bias):
        torch.manual_seed(1)
        return pk.reference.lora_linear(x, w, a, b, bias=bias, scaling=0.7, dropout_p=0.25)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_meta_tensors(quantized):
    """Shapes and dtypes without memory, as eager torch gives them."""
    shapes = (2, 3, 64), (8, 64), (4, 64), (8, 4)
    x, w, a, b = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes)
    weight = pk.Weight4bit.quantize(torch.randn(8, 64)).to("meta") if quantized else w
    y = pk.functional.lora_linear(x, weight, a.float(), b.float(), dropout_p=0.5)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 8), torch.bfloat16)


class TestModule:
    """pk.nn.LoRALinear."""

    def make(self, quantized, **options):
        torch.manual_seed(0)
        linear = torch.nn.Linear(128, 32)
        base = pk.nn.Linear4bit.from_linear(linear) if quantized else linear
        layer = pk.nn.LoRALinear(base, 4, **options)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        return layer, torch.randn(3, 128)

    def test_names_are_those_of_peft(self):
        peft = pytest.importorskip("peft")
        model = torch.nn.Sequential(torch.nn.Linear(128, 32))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
        theirs = {name.split(".0.")[-1] for name in wrapped.state_dict()}
        assert set(self.make(False)[0].state_dict()) == theirs

    @pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
    def test_merge_and_unmerge(self, backend, quantized):
        layer, x = self.make(quantized, use_rslora=True)
        assert layer.scaling == {"default": 4.0}
        before = layer(x)
        layer.merge()
        layer.merge()
        merged = layer(x)
        assert layer.merged_adapters == ["default"]
        # merging into 4 bits quantizes the sum again: the error is that of NF4 itself
        tolerance = {"rtol": 0.2, "atol": 3.0} if quantized else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(merged, before, **tolerance)
        layer.unmerge()
        torch.testing.assert_close(layer(x), before, **tolerance)

    def test_merge_of_all_or_none(self):
        layer = pk.nn.LoRALinear(torch.nn.Linear(64, 8, bias=False), 4)
        layer.add_adapter("second", 2, lora_bias=True)
        layer.set_adapter(["default", "second"])
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        before = layer.base_layer.weight.clone()
        with pytest.raises(ValueError, match="lora_bias: expected a base layer with a bias.*'second'"):
            layer.merge()
        assert layer.merged_adapters == [] and torch.equal(layer.base_layer.weight, before)

    def test_several_adapters(self, backend):
        layer, x = self.make(True)
        layer.add_adapter("second", 2, lora_bias=True)
        torch.nn.init.normal_(layer.lora_B["second"].weight)
        outputs = {}
        for names in ([], ["default"], ["second"], ["default", "second"]):
            layer.set_adapter(names)
            outputs[tuple(names)] = layer(x)
        deltas = [outputs[(name,)] - outputs[()] for name in ("default", "second")]
        torch.testing.assert_close(outputs[("default", "second")], outputs[()] + sum(deltas))

    def test_only_adapters_train(self, backend):
        layer, x = self.make(True)
        layer(x).sum().backward()
        trained = {name for name, p in layer.named_parameters() if p.grad is not None}
        assert trained == {"lora_A.default.weight", "lora_B.default.weight"}

    def test_repr_and_errors(self):
        layer, _ = self.make(True)
        assert "active=['default']" in repr(layer)
        with pytest.raises(ValueError, match=r"names: expected adapters of \['default'\], got 'other'"):
            layer.set_adapter("other")
        with pytest.raises(ValueError, match="name: expected a new adapter name"):
            layer.add_adapter("default", 4)
        with pytest.raises(TypeError, match="r: expected an int, got float"):
            layer.add_adapter("second", 2.5)
        with pytest.raises(ValueError, match=r"lora_dropout: expected a probability from 0 to 1, got 1.5"):
            layer.add_adapter("second", 4, lora_dropout=1.5)
        with pytest.raises(ValueError, match=r"name: expected a name without dots, got 'a.b'"):
            layer.add_adapter("a.b", 4)
        with pytest.raises(TypeError, match=r"base_layer: expected nn.Linear or Linear4bit, got ReLU"):
            pk.nn.LoRALinear(torch.nn.ReLU(), 4)
        with pytest.raises(TypeError, match=r"lora_dropout: expected a probability from 0 to 1, got NoneType"):
            layer.add_adapter("second", 4, lora_dropout=None)
        with pytest.raises(TypeError, match=r"base_layer: expected nn.Linear or Linear4bit, got int"):
            pk.nn.LoRALinear.from_linear(3, 4)
        for other in (3, torch.nn.Linear(64, 32)):
            with pytest.raises(TypeError, match=r"layer: expected a bitsandbytes.nn.Linear4bit, got (int|Linear)\."):
                pk.nn.LoRALinear.from_bnb(other, 4)

    def test_packed_weights_are_not_taken_for_dense_ones(self, packed_layer):
        match = rf"base_layer: .*a dense weight, got {type(packed_layer).__name__}.*from_bnb"
        with pytest.raises(TypeError, match=match):
            pk.nn.LoRALinear.from_linear(packed_layer, 4)


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy; nothing runs."""

    def call(self, **changes):
        arguments = {
            "x": torch.randn(2, 64),
            "weight": torch.randn(32, 64),
            "lora_A": torch.randn(4, 64),
            "lora_B": torch.randn(32, 4),
        }
        return pk.functional.lora_linear(**arguments | changes)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"weight": "w"}, TypeError, r"weight: expected a torch.Tensor or a Weight4bit, got str"),
            ({"weight": torch.randn(32, 64).bfloat16()}, ValueError, r"weight: expected dtype torch.float32.*Cast"),
            ({"x": torch.randn(2, 60)}, ValueError, r"x: expected shape \(..., 64\), got \(2, 60\)"),
            ({"lora_A": torch.randn(4, 63)}, ValueError, r"lora_A\[0\]: expected shape \(4, 64\), got \(4, 63\)"),
            ({"lora_B": torch.randn(32, 5)}, ValueError, r"lora_B\[0\]: expected shape \(32, 4\), got \(32, 5\)"),
            (
                {"lora_A": [torch.randn(4, 64)], "lora_B": [torch.randn(32, 4)] * 2},
                ValueError,
                r"lora_B: expected 1 entries.*got 2",
            ),
            ({"scaling": [1.0, 2.0]}, ValueError, r"scaling: expected 1 entries.*got 2"),
            ({"scaling": torch.ones(2)}, ValueError, r"scaling: expected 1 entries.*got 2"),
            ({"scaling": None}, TypeError, r"scaling: expected a number, or one for each adapter, got NoneType"),
            ({"dropout_p": "x"}, TypeError, r"dropout_p: expected a number, or one for each adapter, got str"),
            ({"lora_A": None}, TypeError, r"lora_A: expected a torch.Tensor, or a sequence of them, got NoneType"),
            ({"lora_bias": 1.0}, TypeError, r"lora_bias: expected a torch.Tensor, or a sequence of them, got float"),
            ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a probability from 0 to 1, got 1.5"),
            ({"lora_bias": torch.randn(4)}, ValueError, r"lora_bias\[0\]: expected shape \(32,\), got \(4,\)"),
            ({"lora_A": torch.empty(0, 64), "lora_B": torch.empty(32, 0)}, ValueError, "a rank of at least 1"),
            ({"lora_A": torch.ones(4, 64, dtype=torch.int8)}, ValueError, r"lora_A\[0\]: .*int8.*Cast"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_message(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)
