"""Fixtures that every operation's tests share."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Each backend that runs on the CPU, chosen by name, so that nothing falls back."""
    if reason := dispatch.why_not(request.module.OP, request.param, torch.device("cpu"), ()):
        pytest.skip(reason)
    with pk.use_backend(request.param):
        yield request.param


def pytest_collection_modifyitems(items):
    """Where there is a GPU, the Triton kernels' tests run on it: `-m gpu` takes them along."""
    for item in items:
        if item.path.name.startswith("test_triton_") and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
