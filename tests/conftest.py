"""Fixtures that every operation's tests share."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch, native


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


@pytest.fixture(params=native.load().supported_isas() if native.why_not() is None else [])
def isa(request):
    """Each instruction set of this machine, in the native core, chosen by name."""
    core = native.load()
    before = core.isa()
    core.set_isa(request.param)
    with pk.use_backend("native"):
        yield request.param
    core.set_isa(before)


@pytest.fixture(
    params=[
        ("Linear4bit", {}),
        ("Linear4bit", {"quant_storage": torch.bfloat16}),
        ("Linear8bitLt", {"has_fp16_weights": False}),
    ],
    ids=["4bit", "4bit-as-bfloat16", "8bit"],
)
def packed_layer(request):
    """A linear layer of bitsandbytes, 64 to 32, whose weight is codes."""
    kind, options = request.param
    bnb = pytest.importorskip("bitsandbytes")
    return getattr(bnb.nn, kind)(64, 32, **options).to("cpu")  # which quantizes it


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """As many threads as given, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poison():
    """Every tensor that is allocated without a value holds NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
