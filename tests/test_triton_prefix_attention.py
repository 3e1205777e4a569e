"""The Triton kernels of the prompt attentions (on a GPU, or in the interpreter: see test_triton_common.py)."""

import pytest
import torch
from attention_support import concatenated, two_attentions
from triton_support import DEVICE, HALVES, randn, seed  # noqa: F401

import peft_kernels as pk
from peft_kernels.testing import assert_within_budget

# B, H, Hkv, L, S, D, P
SHAPES = {
    "one-row": (2, 2, 2, 1, 5, 32, 1),
    "decode-grouped": (2, 4, 1, 1, 9, 64, 17),
    "primes": (2, 4, 2, 37, 37, 40, 70),
    "wide": (1, 1, 1, 33, 20, 256, 40),  # float32: by torch's products
    "widest": (2, 4, 2, 7, 7, 264, 9),  # by torch's products
}


@pytest.fixture(autouse=True)
def triton_backend():
    with pk.use_backend("triton"):
        yield


def check(kernel, oracle, usual, leaves, dy, **options):
    """The result and every gradient within the budget."""

    def run(function, cast):
        inputs = [cast(t).detach().requires_grad_() for t in leaves]
        y = function(*inputs, **options)
        return [y.detach(), *torch.autograd.grad(y, inputs, cast(dy))]

    ours = run(kernel, lambda t: t)
    truth, eager = run(oracle, lambda t: t.double()), run(usual, lambda t: t)
    for i, (actual, exact, near) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(actual, exact, near, f"result {i}")


def tensors(shape, dtype):
    b, h, hkv, length, keys, width, prompt = shape
    q, dy = (randn(b, length, h, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (randn(b, hkv, keys, width, dtype=dtype) for _ in range(2))
    return q, k, v, [randn(hkv, prompt, width, dtype=dtype) for _ in range(2)], dy


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prefix(poison, shape, dtype):
    q, k, v, prefix, dy = tensors(shape, dtype)
    is_causal = shape[3] == shape[4]
    check(
        pk.functional.prefix_attention,
        pk.reference.prefix_attention,
        concatenated,
        (q, k, v, *prefix),
        dy,
        is_causal=is_causal,
    )


def test_prefix_with_a_mask(poison):
    q, k, v, prefix, dy = tensors((2, 2, 1, 17, 13, 64, 20), torch.float32)
    mask = torch.rand(2, 1, 17, 13, device=DEVICE) < 0.5
    mask[0, 0, 3] = False
    check(
        pk.functional.prefix_attention,
        pk.reference.prefix_attention,
        concatenated,
        (q, k, v, *prefix),
        dy,
        attn_mask=mask,
    )


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_gated(poison, dtype, per_sample):
    q, k, v, prompt, dy = tensors(SHAPES["primes"], dtype)
    if per_sample:
        prompt = [randn(2, 2, 10, 40, dtype=dtype) for _ in range(2)]
    gate = torch.linspace(-1.0, 1.5, 4, device=DEVICE)
    leaves = (q, k, v, *prompt, gate)
    check(
        pk.functional.gated_prompt_attention,
        pk.reference.gated_prompt_attention,
        two_attentions,
        leaves,
        dy,
        is_causal=True,
    )


def test_closed_gate():
    q, k, v, prompt, _ = tensors(SHAPES["primes"], torch.float32)
    gate = torch.zeros(4, device=DEVICE, requires_grad=True)
    y = pk.functional.gated_prompt_attention(q, k, v, *prompt, gate)
    base = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(y, base)
    y.square().sum().backward()
    assert (gate.grad != 0).all()


def test_two_runs_agree_bitwise():
    q, k, v, prefix, dy = tensors(SHAPES["primes"], torch.float32)
    prefix[0].requires_grad_()
    runs = []
    for _ in range(2):
        y = pk.functional.prefix_attention(q, k, v, *prefix)
        runs.append((y, *torch.autograd.grad(y, prefix[0], dy)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
