"""The choice of a backend: by name, by default, and explained."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch


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
