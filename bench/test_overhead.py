"""What a call costs on the host before any kernel runs: the bar is 15 microseconds, with a kernel that does nothing.

The fastest of many repetitions: a busy machine can only make a call slower. On a slow machine the bar is the time of
eight of torch's own linear layers of one number, sampled in turn with the call: on a Skylake server one takes 6 to 10
microseconds.
"""

import timeit
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels import dispatch

MOST_SECONDS, MOST_LINEAR_LAYERS = 15e-6, 8
ONE = torch.ones(1, 1)
N = K = 4096
X, A, B = torch.randn(1, K).bfloat16(), torch.randn(16, K) * 0.02, torch.randn(N, 16) * 0.02
Y, S = torch.empty(1, N).bfloat16(), torch.empty(1, 16)


@pytest.fixture(scope="module")
def weight():
    return pk.Weight4bit.quantize(torch.randn(N, K).bfloat16())


CALLS = {
    "linear_4bit": (lambda weight: pk.functional.linear_4bit(X, weight), Y),
    "lora_linear": (lambda weight: pk.functional.lora_linear(X, weight, A, B, scaling=2.0), (Y, S)),
}


@pytest.mark.alone
@pytest.mark.parametrize("op", CALLS)
@torch.no_grad()
def test_a_call_with_a_null_kernel(op, weight):
    call, result = CALLS[op]
    backend = dispatch.choose(op, X.device, (torch.bfloat16, torch.float32))
    if backend == "reference":
        pytest.skip("the reference path has no kernel to replace")
    null = mock.create_autospec(dispatch.implementation(op, backend).forward)
    with mock.patch.object(dispatch.implementation(op, backend), "forward", null):
        null.return_value = result
        call(weight)
        assert null.call_count == 1, "the call does not reach the kernel"
    with mock.patch.object(dispatch.implementation(op, backend), "forward", lambda *arguments: result):
        calls = (lambda: call(weight), lambda: F.linear(ONE, ONE))
        samples = [[timeit.timeit(c, number=500) / 500 for c in calls] for _ in range(40)]
    seconds, linear = map(min, zip(*samples, strict=True))
    told = f"{op}: {seconds * 1e6:.1f} microseconds, torch's linear layer of one number {linear * 1e6:.1f}"
    assert seconds <= max(MOST_SECONDS, MOST_LINEAR_LAYERS * linear), told
    print(told)
