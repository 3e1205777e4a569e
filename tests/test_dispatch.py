"""The choice of a backend: by name, by default, and explained."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad

import peft_kernels as pk
from peft_kernels import dispatch, native

F = pk.functional


@pytest.fixture
def call():
    return torch.randn(2, 64), pk.Weight4bit.quantize(torch.randn(32, 64))


@pytest.fixture
def no_implementation(monkeypatch):
    """Every fast backend refuses, each with a reason of its own."""

    def refuse(op, backend, device, dtypes):
        return None if backend == "reference" else f"{backend} is switched off"

    monkeypatch.setattr(dispatch, "why_not", refuse)
    dispatch._search.cache_clear()
    yield
    dispatch._search.cache_clear()


def test_context_manager_restores(call):
    with pk.use_backend("reference"):
        assert pk.explain(pk.functional.linear_4bit, *call) == "linear_4bit: reference"
        with pk.use_backend("auto"):
            assert dispatch._requested == "auto"
        assert dispatch._requested == "reference"
    assert dispatch._requested == "auto"


def test_as_a_function(call):
    pk.use_backend("reference")
    try:
        assert pk.explain(pk.functional.linear_4bit, *call) == "linear_4bit: reference"
    finally:
        pk.use_backend("auto")


def test_a_stored_object_sets_its_backend_where_it_is_entered():
    stored = pk.use_backend("reference")
    pk.use_backend("auto")
    with stored:
        assert dispatch._requested == "reference"
        with pk.use_backend("native"), stored:
            assert dispatch._requested == "reference"
        assert dispatch._requested == "reference"
    assert dispatch._requested == "auto"


def test_a_stored_object_restores_what_is_in_force_at_entry():
    stored = pk.use_backend("reference")
    pk.use_backend("native")
    try:
        for _ in range(2):
            with stored:
                assert dispatch._requested == "reference"
            assert dispatch._requested == "native"
    finally:
        pk.use_backend("auto")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected one of .*'native'.*got 'cuda'"):
        pk.use_backend("cuda")
    assert dispatch._requested == "auto"


def test_auto_falls_back_with_one_log_line(call, no_implementation, caplog):
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        pk.functional.linear_4bit(*call)
        pk.functional.linear_4bit(*call)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("linear_4bit")]
    assert lines == [
        "linear_4bit runs on the reference path (slow): native: native is switched off; triton: triton is switched off"
    ]


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_named_backend_never_falls_back(call, no_implementation, name):
    with pk.use_backend(name), pytest.raises(pk.BackendError, match=f"{name} is switched off.*use_backend"):
        pk.functional.linear_4bit(*call)


def test_explain_names_every_reason_and_runs_nothing(call, no_implementation, monkeypatch):
    monkeypatch.setattr("peft_kernels.ops.linear_4bit.reference.linear_4bit", pytest.fail)
    assert pk.explain(pk.functional.linear_4bit, *call).splitlines() == [
        "linear_4bit: reference",
        "  not native: native is switched off",
        "  not triton: triton is switched off",
    ]


def test_explain_modules(call):
    layer = pk.nn.LoRALinear(pk.nn.Linear4bit(call[1]), 4)
    assert pk.explain(layer).startswith("lora_linear: ")
    assert pk.explain(layer, call[0]).startswith("lora_linear: ")
    assert "no peft_kernels operation" in pk.explain(torch.nn.ReLU(), call[0])


def in_a_thread(function, *args):
    """What function(*args) returns or raises in another thread."""
    outcome = []

    def target():
        try:
            outcome.append(function(*args))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return outcome[0]


def test_explaining_leaves_other_threads_alone(call):
    y, results = F.linear_4bit(*call), []
    assert dispatch.record(lambda: results.append(in_a_thread(F.linear_4bit, *call))) == []
    assert torch.equal(results[0], y)
    recorded = dispatch.record(
        lambda: (results.append(in_a_thread(pk.explain, F.linear_4bit, *call)), F.linear_4bit(*call))
    )
    assert [str(step) for step in recorded] == [results[1]] == [pk.explain(F.linear_4bit, *call)]
    assert not dispatch.recording() and torch.equal(F.linear_4bit(*call), y)


def test_explaining_leaves_other_threads_compiled_code_alone(call):
    compiled, results = torch.compile(F.linear_4bit, fullgraph=True, backend="aot_eager"), []
    y = compiled(*call)
    assert dispatch.record(lambda: results.append(in_a_thread(compiled, *call))) == []
    assert torch.equal(results[0], y)


def affine(name):
    """A function of x (3, 64) that is affine, so that its tangent is a difference; with fixed random arguments."""
    torch.manual_seed(0)
    w, a, b, scale = torch.randn(32, 64), torch.randn(4, 64), torch.randn(32, 4), torch.randn(32)
    four = pk.Weight4bit.quantize(w)
    return {
        "linear_4bit": lambda x: F.linear_4bit(x, four, scale),
        "lora_linear": lambda x: F.lora_linear(x, four, a, b),
        "lora_linear-dense": lambda x: F.lora_linear(x, w, a, b),
        "ia3_linear": lambda x: F.ia3_linear(x, four, scale),
        "bottleneck_adapter": lambda x: F.bottleneck_adapter(x, a, None, b, None, activation="identity"),
    }[name]


@pytest.mark.parametrize(
    "name", ["linear_4bit", "lora_linear", "lora_linear-dense", "ia3_linear", "bottleneck_adapter"]
)
def test_forward_mode_takes_the_reference(name):
    function, (x, t) = affine(name), torch.randn(2, 3, 64)
    expected = function(x + t) - function(x)
    y, tangent = torch.func.jvp(function, (x,), (t,))
    torch.testing.assert_close(y, function(x))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
        explained = pk.explain(function, x)
        assert ": reference\n" in explained and "not native: it has no forward-mode derivative" in explained
    assert "forward-mode" not in pk.explain(function, x)


@pytest.mark.parametrize(
    "name", ["linear_4bit", "lora_linear", "lora_linear-dense", "ia3_linear", "bottleneck_adapter"]
)
def test_transforms_of_torch_func_take_the_reference(name):
    function, x = affine(name), torch.randn(3, 64)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf).square().sum(), leaf)[0]
    loss = lambda x: function(x).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-4, atol=1e-4)
    per_sample = torch.func.vmap(torch.func.grad(lambda row: loss(row[None])))(x)
    torch.testing.assert_close(per_sample, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(function)(x[:, None])[:, 0], function(x), rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(lambda row: function(row[None])[0])(x[0])
    torch.testing.assert_close(
        jacobian @ torch.ones(64), function(x[:1] + 1)[0] - function(x[:1])[0], rtol=1e-3, atol=1e-3
    )
    explained = []
    torch.func.vmap(lambda x: explained.append(pk.explain(function, x)) or x)(x[:, None])
    assert ": reference\n" in explained[0] and "not native: a transform of torch.func" in explained[0]
    with pk.use_backend("native"), pytest.raises(pk.BackendError, match=r"'native'.*torch\.func"):
        torch.func.grad(loss)(x)


@pytest.mark.parametrize(
    "name", ["linear_4bit", "lora_linear", "lora_linear-dense", "ia3_linear", "bottleneck_adapter"]
)
def test_transforms_within_torch_compile(name):
    """The compiler would trace an autograd Function under a transform into wrong numbers, without a word."""
    function, x = affine(name), torch.randn(3, 64)
    loss = lambda x: function(x).square().sum()  # noqa: E731
    both = torch.compile(lambda x: (torch.func.grad(loss)(x), loss(x)), backend="aot_eager", fullgraph=True)
    gradient, value = both(x)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value, loss(x), rtol=1e-4, atol=1e-4)
    tangent = torch.compile(lambda x: torch.func.jvp(function, (x,), (x,))[1], backend="aot_eager")(x)
    torch.testing.assert_close(tangent, torch.func.jvp(function, (x,), (x,))[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_4bit", "lora_linear", "ia3_linear"])
def test_a_gradient_of_a_gradient_is_refused(name):
    """Also where no upstream gradient requires one: the penalty would train nothing."""
    if reason := native.why_not():
        pytest.skip(reason)
    function, x = affine(name), torch.randn(3, 64, requires_grad=True)
    for output in (function(x).sum(), function(x).square().sum()):
        gradient = torch.autograd.grad(output, x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no second derivative.*use_backend\(.reference.\)"):
            (output + gradient.square().sum()).backward()
    with pk.use_backend("reference"):
        gradient = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0


def test_a_named_backend_refuses_forward_mode(call):
    x, weight = call
    with pk.use_backend("native"), pytest.raises(pk.BackendError, match=r"'native'.*linear_4bit.*forward-mode"):
        torch.func.jvp(lambda x: F.linear_4bit(x, weight), (x,), (x,))
    with pk.use_backend("reference"):
        tangent = torch.func.jvp(lambda x: F.linear_4bit(x, weight), (x,), (x,))[1]
        assert torch.equal(tangent, F.linear_4bit(x, weight))


def test_every_implementation_can_be_imported_or_says_why():
    for op, modules in dispatch.IMPLEMENTATIONS.items():
        for backend in modules:
            try:
                assert callable(dispatch.implementation(op, backend).why_not)
            except ImportError as error:
                assert "triton" in str(error)


def test_backends_lists_reasons():
    answers = pk.backends()
    assert list(answers) == ["native", "triton", "reference"] and answers["reference"] is None
    assert all(reason is None or reason for reason in answers.values())


@pytest.mark.parametrize(("value", "ok"), [("reference", True), ("fastest", False)])
def test_environment_variable(value, ok):
    code = "import peft_kernels.dispatch as d; print(d._requested)"
    environment = os.environ | {"PEFT_KERNELS_BACKEND": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == ok
    assert value in (result.stdout if ok else result.stderr)
