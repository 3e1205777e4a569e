"""Fixtures that every operation's tests share."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch

_PROBES = {
    "nf4": lambda: (torch.empty(1),),
    "linear_4bit": lambda: (torch.empty(1, 64), None),
    "lora_linear": lambda: (torch.empty(1, 64), None, [], []),
}


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Each backend that runs on the CPU, chosen by name, so that nothing falls back."""
    op = request.module.OP
    if reason := dispatch.why_not(op, request.param, *_PROBES[op]()):
        pytest.skip(reason)
    with pk.use_backend(request.param):
        yield request.param
