"""gated_prompt_attention: forward and every gradient against float64, the closed gate, per-sample prompts, modules."""

import pytest
import torch
import torch.nn.functional as F
from attention_support import AttentionCase, two_attentions
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import dispatch
from peft_kernels.ops.gated_prompt_attention.native_calls import takes_keys
from peft_kernels.ops.prefix_attention import library

OP = "gated_prompt_attention"
# B, H, Hkv, L, S, D, P
SHAPES = {
    "one-row": (32, 4, 4, 1, 1, 32, 1),  # the one score gradient of a row is luck: many rows
    "decode-grouped": (2, 6, 2, 1, 70, 128, 17),
    "primes": (2, 3, 3, 31, 31, 80, 7),
    "grouped": (2, 8, 2, 37, 37, 64, 10),
    "one-kv-head": (1, 5, 1, 65, 65, 32, 33),
    "wide": (1, 2, 2, 40, 40, 256, 49),
    "long-prompt": (1, 2, 2, 33, 33, 64, 512),
    "llama": (1, 8, 8, 128, 128, 128, 10),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("q", "k", "v", "prompt_k", "prompt_v", "gate")


class Case(AttentionCase):
    """One call of gated_prompt_attention."""

    names = NAMES
    function = pk.functional.gated_prompt_attention
    reference = pk.reference.gated_prompt_attention
    fused = two_attentions

    def __init__(self, shape, dtype, *, per_sample=False, scalar=False, gate_dtype=None, **options):
        batch, heads, kv_heads, length, keys, width, prompt = shape
        torch.manual_seed(sum(shape))
        self.q, self.dy = (torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
        self.k, self.v = (torch.randn(batch, kv_heads, keys, width).to(dtype) for _ in range(2))
        prompts = (batch, kv_heads, prompt, width) if per_sample else (kv_heads, prompt, width)
        self.prompt_k, self.prompt_v = (torch.randn(prompts).to(dtype) for _ in range(2))
        self.gate = torch.randn(() if scalar else (heads,)).to(gate_dtype or dtype)
        self.options = options


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, shape, dtype):
    Case(shape, dtype, is_causal=shape[3] == shape[4] > 1).check(backend)


@pytest.mark.parametrize("scalar", [False, True], ids=["gate per head", "one gate"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_prompts_and_gates(backend, per_sample, scalar):
    options = {"per_sample": per_sample, "scalar": scalar, "gate_dtype": torch.float32, "scale": 0.2}
    Case(SHAPES["grouped"], torch.bfloat16, **options).check(backend)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_masks(backend, is_causal):
    mask = torch.arange(31) < torch.tensor([25, 0]).view(2, 1, 1, 1)  # the second sample sees no key
    if is_causal:
        mask = torch.zeros(2, 1, 1, 31).masked_fill(~mask, -torch.inf).masked_fill_(mask, -0.5)
    Case(SHAPES["primes"], torch.float32, attn_mask=mask.float() if is_causal else mask, is_causal=is_causal).check(
        backend
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["grouped", "llama", "decode-grouped"])
def test_closed_gate_is_torch_bit_for_bit(shape, dtype):
    """And the gate gets its gradient in the same pass, while the prompt's is zero."""
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(SHAPES[shape], dtype)
    case.options["is_causal"] = is_causal = SHAPES[shape][3] > 1
    case.q[0, 0, 0] = 0
    case.v[0, 0] = -0.0  # a zero with a sign stays one
    open_gate = case.run(pk.functional.gated_prompt_attention)
    case.gate = torch.zeros_like(case.gate)
    with pk.use_backend("native"):
        ours = case.run(pk.functional.gated_prompt_attention)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    base = F.scaled_dot_product_attention(*leaves, is_causal=is_causal, enable_gqa=case.q.shape[1] != case.k.shape[1])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ours["y"].view(bits), base.view(bits))
    if not takes_keys(case.q, case.k, case.v, None):  # else they are ours: test_own_backward_over_the_keys
        for name, gradient in zip("qkv", torch.autograd.grad(base, leaves, case.dy), strict=True):
            assert torch.equal(ours[f"d{name}"], gradient)
    assert not ours["dprompt_k"].any() and not ours["dprompt_v"].any()
    assert torch.equal(ours["dgate"], open_gate["dgate"]) and (ours["dgate"] != 0).all()


@pytest.mark.parametrize("shape", ["primes", "grouped", "llama"])
def test_own_backward_over_the_keys(shape, monkeypatch):
    """torch differentiates no attention, its forward stays bit for bit, and all gradients are within the budget."""
    case = Case(SHAPES[shape], torch.bfloat16, is_causal=True)
    if dispatch.why_not(OP, "native", case.q.device, ()) or not takes_keys(case.q, case.k, case.v, None):
        pytest.skip("torch's own backward is taken here")
    with torch.no_grad():  # there SDPA is called itself
        expected = pk.functional.gated_prompt_attention(*case.arguments(), **case.options)
    case.check("native")
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    ours = case.run(pk.functional.gated_prompt_attention)
    assert torch.equal(ours["y"], expected)
    case.gate = torch.zeros_like(case.gate)
    closed = case.run(pk.functional.gated_prompt_attention)
    assert torch.equal(closed["dk"], ours["dk"]) and torch.equal(closed["dv"], ours["dv"])
    assert not torch.equal(closed["dq"], ours["dq"])  # the prompt's part is added to it


def test_flash_switched_off_is_respected():
    """Then torch's attention is another kernel, of which we have no log-sum-exp."""
    case = Case(SHAPES["grouped"], torch.bfloat16, is_causal=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not takes_keys(case.q, case.k, case.v, None)
    assert not takes_keys(case.q, case.k.mT.contiguous().mT, case.v, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_needs_a_gradient(backend, wanted, dtype):
    case = Case(SHAPES["grouped"], dtype, is_causal=True)
    every = case.run(pk.functional.gated_prompt_attention)
    leaves = [t.detach().requires_grad_(name == wanted) for name, t in zip(NAMES, case.arguments(), strict=True)]
    pk.functional.gated_prompt_attention(*leaves, **case.options).backward(case.dy)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert (leaf.grad is not None) == (name == wanted)
        if name == wanted:
            torch.testing.assert_close(leaf.grad, every[f"d{name}"])


def test_runs_agree_bitwise_also_under_checkpointing(backend):
    case = Case(SHAPES["llama"], torch.bfloat16, is_causal=True)
    through = lambda *a, **o: checkpoint(pk.functional.gated_prompt_attention, *a, use_reentrant=False, **o)  # noqa: E731
    once = case.run(pk.functional.gated_prompt_attention)
    for again in (case.run(pk.functional.gated_prompt_attention), case.run(through)):
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_nan_strides_number_autocast_and_empty(backend):
    case = Case(SHAPES["grouped"], torch.float32)
    q, k, v, prompt_k, prompt_v, _ = case.arguments()
    call = pk.functional.gated_prompt_attention
    expected = call(q, k, v, prompt_k, prompt_v, torch.tensor(0.5))
    widest = lambda t: t.mT.contiguous().mT  # noqa: E731
    torch.testing.assert_close(call(widest(q), widest(k), v, widest(prompt_k), prompt_v, 0.5), expected)
    repeated = [p.expand(2, -1, -1, -1) for p in (prompt_k, prompt_v)]
    torch.testing.assert_close(call(q, k, v, *repeated, 0.5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(q, k, v, prompt_k, prompt_v, 0.5).dtype == torch.bfloat16
    prompt_k[0, 0, 0] = torch.nan
    assert torch.equal(
        call(q, k, v, prompt_k, prompt_v, 0.5).isnan(),
        pk.reference.gated_prompt_attention(q, k, v, prompt_k, prompt_v, torch.tensor(0.5)).isnan(),
    )
    gate = torch.ones(8, requires_grad=True)
    y = call(q[:0], k[:0], v[:0], prompt_k, prompt_v, gate)
    y.sum().backward()
    assert y.shape == (0, *q.shape[1:]) and not gate.grad.any()


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_library_ops(per_sample):
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(SHAPES["grouped"], torch.bfloat16, per_sample=per_sample, gate_dtype=torch.float32)
    base = F.scaled_dot_product_attention(case.q, case.k, case.v, enable_gqa=True)
    shared = (case.q, case.prompt_k, case.prompt_v, case.gate)
    forward = torch.ops.peft_kernels.gated_prompt_attention_forward.default
    torch.library.opcheck(forward, (base, *shared, 0.1, "native"))
    _, lse = forward(base, *shared, 0.1, "native")
    backward = torch.ops.peft_kernels.gated_prompt_attention_backward.default
    base, base_lse = library.forward(case.q, case.k, case.v, None, False, 0.1)
    for needs in ([True] * 3, [False, True, False], [True, False, True]):
        for keys in ([], [case.k, case.v, base, base_lse.contiguous()]):
            torch.library.opcheck(backward, (case.dy, *shared, lse, keys, False, 0.1, needs, "native"))


@pytest.mark.slow
def test_compile(backend):
    case = Case(SHAPES["grouped"], torch.bfloat16, is_causal=True)
    case.check(backend, torch.compile(pk.functional.gated_prompt_attention, fullgraph=True))


def test_gradcheck():
    torch.manual_seed(0)
    shapes = ((2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4), (1, 2, 4), (2, 1, 2, 4), (2,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(q, k, v, prompt_k, prompt_v, gate):
        prompt_k = prompt_k.expand_as(prompt_v)
        return pk.reference.gated_prompt_attention(q, k, v, prompt_k, prompt_v, gate, is_causal=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


class TestModule:
    """pk.nn.GatedPromptAttention."""

    def call(self, **options):
        torch.manual_seed(0)
        module = pk.nn.GatedPromptAttention(4, 5, 32, num_kv_heads=2, **options)
        torch.nn.init.constant_(module.gate, 0.7)
        q, k = torch.randn(3, 4, 6, 32), torch.randn(3, 2, 6, 32)
        return module, q, k

    def test_starts_closed(self):
        module = pk.nn.GatedPromptAttention(4, 5, 32, gate_per_head=False)
        assert not module.gate.any() and module.gate.shape == (1,) and module.prompt_k.shape == (4, 5, 32)
        assert "gate=tanh" in repr(module)

    @pytest.mark.parametrize("activation", ["tanh", None])
    def test_gate(self, backend, activation):
        module, q, k = self.call(gate_activation=activation)
        gate = module.gate.tanh() if activation else module.gate
        expected = pk.reference.gated_prompt_attention(q, k, k, module.prompt_k, module.prompt_v, gate)
        torch.testing.assert_close(module(q, k, k), expected)

    def test_image_features(self, backend):
        """Each sample's features, projected, are added to the trained prompt; both learn."""
        module, q, k = self.call()
        features, projection = torch.randn(3, 7), torch.nn.Linear(7, 2 * 2 * 32)
        sample_k, sample_v = projection(features).view(3, 2, 2, 1, 32).unbind(1)
        y = module(q, k, k, sample_k=sample_k, sample_v=sample_v, is_causal=True)
        y.square().sum().backward()
        assert module.prompt_k.grad.abs().max() > 0 and projection.weight.grad.abs().max() > 0
        alone = module(q[1:2], k[1:2], k[1:2], sample_k=sample_k[1:2], sample_v=sample_v[1:2], is_causal=True)
        torch.testing.assert_close(y[1:2], alone)
        assert not torch.allclose(y, module(q, k, k, is_causal=True))

    def test_activation_must_be_known(self):
        with pytest.raises(ValueError, match=r"gate_activation: expected 'tanh' or None, got 'relu'"):
            pk.nn.GatedPromptAttention(4, 5, 32, gate_activation="relu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_k": torch.randn(3, 2, 5, 32)}, r"prompt_k: expected shape .* or \(B=2, ...\) of those"),
        ({"prompt_v": torch.randn(2, 2, 5, 32)}, r"prompt_v: expected shape \(2, 5, 32\)"),
        ({"gate": torch.zeros(3)}, r"gate: expected one element or shape \(H,\) = \(4,\), got \(3,\)"),
        ({"attn_mask": torch.ones(5, 9, 9)}, r"attn_mask: expected a shape that broadcasts"),
    ],
)
def test_bad_input(backend, changes, message):
    q, k, prompt = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32), torch.randn(2, 5, 32)
    arguments = {"q": q, "k": k, "v": k, "prompt_k": prompt, "prompt_v": prompt, "gate": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        pk.functional.gated_prompt_attention(**arguments | changes)


@pytest.mark.parametrize(
    "mask", [torch.tensor(0.5), torch.tensor([True] * 4 + [False] * 2), torch.randn(3, 6).double()]
)
def test_masks_that_torch_does_not_take(backend, mask):
    """Of fewer dimensions, or of another dtype."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 6, 32), torch.randn(2, 2, 6, 32)
    prompt_k, prompt_v, gate = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.rand(4)
    y = pk.functional.gated_prompt_attention(q, k, v, prompt_k, prompt_v, gate, attn_mask=mask)
    expected = pk.reference.gated_prompt_attention(
        q.double(), k.double(), v.double(), prompt_k.double(), prompt_v.double(), gate.double(), attn_mask=mask
    )
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
