"""The Triton kernels of the prompt attentions (on a GPU, or in the interpreter: see test_triton_common.py)."""

import pytest
import torch
from attention_support import concatenated, two_attentions
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton_support import DEVICE, HALVES, randn, seed  # noqa: F401

import peft_kernels as pk
from peft_kernels.ops.prefix_attention import library
from peft_kernels.testing import assert_within_budget

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

# B, H, Hkv, L, S, D, P
SHAPES = {
    "one-row": (2, 2, 2, 1, 5, 32, 1),
    "decode-grouped": (2, 4, 1, 1, 9, 64, 17),
    "primes": (2, 4, 2, 37, 37, 40, 70),
    "one-tile": (2, 4, 2, 97, 97, 128, 20),  # of the prompt: one kernel computes all gradients
    "wide": (1, 1, 1, 33, 20, 256, 40),  # float32: by torch's products
    "widest": (2, 4, 2, 37, 37, 264, 20),  # by torch's products
}


@pytest.fixture(autouse=True)
def triton_backend():
    with pk.use_backend("triton"):
        yield


def results(function, leaves, dy, cast=lambda t: t, **options):
    """y and every gradient."""
    inputs = [cast(t).detach().requires_grad_() for t in leaves]
    y = function(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, cast(dy))]


def check_against(ours, oracle, usual, leaves, dy, **options):
    """Each within the budget."""
    truth = results(oracle, leaves, dy, lambda t: t.double(), **options)
    eager = results(usual, leaves, dy, **options)
    for i, (actual, exact, near) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(actual, exact, near, f"result {i}")


def check(kernel, oracle, usual, leaves, dy, **options):
    """The result and every gradient within the budget."""
    check_against(results(kernel, leaves, dy, **options), oracle, usual, leaves, dy, **options)


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


@pytest.mark.parametrize("train_keys", [False, True], ids=["frozen-keys", "trained-keys"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_closed_gate(dtype, train_keys):
    q, k, v, prompt, dy = tensors(SHAPES["primes"], dtype)
    gate = torch.zeros(4, device=DEVICE, requires_grad=True)
    q, k, v = (t.requires_grad_(train_keys) for t in (q, k, v))
    y = pk.functional.gated_prompt_attention(q, k, v, *prompt, gate)
    base = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(y, base)
    y.backward(dy)
    assert (gate.grad != 0).all()


def test_two_runs_agree_bitwise():
    q, k, v, prefix, dy = tensors(SHAPES["primes"], torch.float32)
    prefix[0].requires_grad_()
    runs = []
    for _ in range(2):
        y = pk.functional.prefix_attention(q, k, v, *prefix)
        runs.append((y, *torch.autograd.grad(y, prefix[0], dy)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


KINDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def leaves_of(heads, dtype, layout, width=64):
    q, k, v, prefix, dy = tensors((2, *heads, 80, 80, width, 20), dtype)
    return [q if layout == "token-major" else q.contiguous(), k, v, *prefix], dy


def require(kind, q, k, v):
    """Skip where this GPU or this torch has no such kernel for the call."""
    try:
        chosen = library._kernel(q, k, v, None, True, 0.1, False)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert chosen == kind.value


@needs_gpu
@pytest.mark.filterwarnings("ignore")  # torch's, about the kernels that it does not take
@pytest.mark.parametrize("layout", ["token-major", "head-major"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["as-many-heads", "grouped"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kernel_of_torch(poison, monkeypatch, kind, dtype, heads, layout):
    monkeypatch.setattr(library, "_refused", set())
    leaves, dy = leaves_of(heads, dtype, layout)
    with sdpa_kernel(kind):
        require(kind, *leaves[:3])
        ours = results(pk.functional.prefix_attention, leaves, dy, is_causal=True)
    assert not library._refused
    check_against(ours, pk.reference.prefix_attention, concatenated, leaves, dy, is_causal=True)


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_forward_and_backward_by_different_kernels(poison, kind):
    leaves, dy = leaves_of((8, 2), torch.float16, "head-major", width=37)
    inputs = [t.detach().requires_grad_() for t in leaves]
    padded = library._whole_vectors(*leaves[:3])
    with sdpa_kernel(kind):
        require(kind, *padded)
        y = pk.functional.prefix_attention(*inputs, is_causal=True)
    for other in KINDS:
        with sdpa_kernel(other):
            require(other, *padded)
            ours = [y.detach(), *torch.autograd.grad(y, inputs, dy, retain_graph=True)]
        check_against(ours, pk.reference.prefix_attention, concatenated, leaves, dy, is_causal=True)


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_cudnn_refuses(poison, monkeypatch):
    class Aten:
        def __getattr__(self, name):
            def refuse(*args, **kwargs):
                raise RuntimeError("no plan")

            return refuse if "cudnn" in name else getattr(torch.ops.aten, name)

    library._cudnn_lse_dimensions()
    monkeypatch.setattr(library, "_refused", set())
    leaves, dy = leaves_of((8, 2), torch.bfloat16, "token-major")
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        require(SDPBackend.CUDNN_ATTENTION, *leaves[:3])
        monkeypatch.setattr(library, "aten", Aten())
        for _ in range(2):
            ours = results(pk.functional.prefix_attention, leaves, dy, is_causal=True)
            assert len(library._refused) == 2  # forward and backward, each asked once
    check_against(ours, pk.reference.prefix_attention, concatenated, leaves, dy, is_causal=True)


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.name)
def test_every_gradient_agrees_bitwise_where_torch_is_deterministic(kind):
    leaves, dy = leaves_of((8, 2), torch.bfloat16, "token-major")
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(kind):
            require(kind, *leaves[:3])
            runs = [results(pk.functional.prefix_attention, leaves, dy, is_causal=True) for _ in range(2)]
        assert library._kernel(*leaves[:3], None, True, 0.1, True) != SDPBackend.CUDNN_ATTENTION.value
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["as-many-heads", "grouped"])
@pytest.mark.parametrize("prompt", [10, 70])
@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.name)
def test_gated_owns_the_keys(poison, kind, prompt, heads):
    q, k, v, prompts, dy = tensors((2, *heads, 80, 80, 128, prompt), torch.bfloat16)
    leaves = (q, k, v, *prompts, torch.linspace(-1.0, 1.5, heads[0], device=DEVICE))
    with sdpa_kernel(kind):
        require(kind, q, k, v)
        assert library.is_plain(q, k, v, None, True, 0.1)
        ours = results(pk.functional.gated_prompt_attention, leaves, dy, is_causal=True)
    check_against(ours, pk.reference.gated_prompt_attention, two_attentions, leaves, dy, is_causal=True)


@needs_gpu
def test_decoding_repeats_no_cache():
    q, k, v, prefix, _ = tensors((2, 8, 2, 1, 4096, 64, 20), torch.bfloat16)
    with torch.no_grad():
        pk.functional.prefix_attention(q, k, v, *prefix)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pk.functional.prefix_attention(q, k, v, *prefix)
    assert torch.cuda.max_memory_allocated() - before < k.numel() * k.element_size()
