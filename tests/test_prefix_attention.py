"""prefix_attention: forward and every gradient against float64, masks, groups, decoding, memory, bad input."""

import pytest
import torch
from attention_support import AttentionCase, concatenated
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import dispatch

OP = "prefix_attention"
# B, H, Hkv, L, S, D, P
SHAPES = {
    # one row has one weight for each key, whose error all gradients share, and that is luck: many rows
    "one-row": (32, 4, 4, 1, 1, 32, 1),
    "decode": (24, 4, 4, 1, 37, 64, 5),
    "decode-grouped": (24, 6, 2, 1, 70, 128, 17),
    "primes": (2, 3, 3, 31, 31, 80, 7),
    "grouped": (2, 8, 2, 37, 37, 64, 20),
    "one-kv-head": (1, 5, 1, 65, 65, 32, 33),
    "wide": (1, 2, 2, 40, 40, 256, 49),
    "cross": (2, 2, 1, 13, 50, 64, 128),
    "long-prefix": (1, 2, 2, 33, 33, 64, 512),
    "odd-width": (2, 2, 2, 9, 9, 37, 6),
    "smollm2": (1, 9, 3, 128, 128, 64, 32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def band(length, keys, width=5):
    """A causal sliding window as a bool mask."""
    distance = torch.arange(length)[:, None] - torch.arange(keys)[None, :]
    return (distance >= 0) & (distance < width)


def padding(batch, keys):
    """Keys of each sample, the first sample's all masked."""
    return torch.arange(keys)[None, None, None, :] < torch.arange(batch).mul(3)[:, None, None, None]


class Case(AttentionCase):
    """One call of prefix_attention."""

    names = NAMES
    function = pk.functional.prefix_attention
    reference = pk.reference.prefix_attention
    fused = concatenated

    def __init__(self, shape, dtype, prefix_dtype=None, seed=0, **options):
        batch, heads, kv_heads, length, keys, width, prefix = shape
        torch.manual_seed(sum(shape) + seed)
        self.q, self.dy = (torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
        self.k, self.v = (torch.randn(batch, kv_heads, keys, width).to(dtype) for _ in range(2))
        # as large as the keys: a merge that is wrong shows
        prefixes = (torch.randn(kv_heads, prefix, width).to(prefix_dtype or dtype) for _ in range(2))
        self.prefix_k, self.prefix_v = prefixes
        self.options = options


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, shape, dtype):
    Case(shape, dtype, is_causal=shape[3] == shape[4] > 1).check(backend)


MASKS = {
    "causal, more keys": ("cross", lambda b, h, l, s: None, True),
    "bool window": ("grouped", lambda b, h, l, s: band(l, s), False),
    "padding, a sample without keys": ("grouped", lambda b, h, l, s: padding(b, s), False),
    "padding and causal": ("primes", lambda b, h, l, s: padding(b, s), True),
    "padding, decoding": ("decode-grouped", lambda b, h, l, s: padding(b, s), False),
    "additive for each head": ("primes", lambda b, h, l, s: torch.randn(h, l, s), True),
    "additive for each head, grouped": ("grouped", lambda b, h, l, s: torch.randn(b, h, l, s).bfloat16(), False),
    "one column": ("cross", lambda b, h, l, s: torch.randn(b, 1, l, 1), False),
    "one row": ("one-kv-head", lambda b, h, l, s: torch.randn(s), False),
    "nothing seen": ("primes", lambda b, h, l, s: torch.zeros(1, 1, dtype=torch.bool), False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend, mask, dtype):
    shape, make, is_causal = MASKS[mask]
    b, h, _, l, s, _, _ = SHAPES[shape]
    torch.manual_seed(1)
    Case(SHAPES[shape], DTYPES[dtype], attn_mask=make(b, h, l, s), is_causal=is_causal).check(backend)


def test_scale_and_float32_prefix(backend):
    Case(SHAPES["grouped"], torch.bfloat16, torch.float32, scale=0.3, is_causal=True).check(backend)


def test_large_scores(backend):
    """Neither side of the merge overflows where the other is far away."""
    for factor in (30.0, -30.0):
        case = Case(SHAPES["primes"], torch.float32)
        case.prefix_k *= factor
        case.k *= 0.01
        case.check(backend)


def test_a_wrong_merge_is_seen(backend):
    """The budget notices a prefix that counts for one part in a thousand too much."""
    case = Case(SHAPES["grouped"], torch.float32)
    wrong = lambda q, k, v, pk_, pv, **o: pk.functional.prefix_attention(q, k, v, pk_, pv * 1.001, **o)  # noqa: E731
    with pytest.raises(AssertionError):
        case.check(backend, wrong)


def test_strides_and_empty(backend):
    case = Case((2, 4, 2, 9, 9, 32, 5), torch.float32)
    call = lambda q, k, v: pk.functional.prefix_attention(q, k, v, case.prefix_k, case.prefix_v)  # noqa: E731
    expected = call(case.q, case.k, case.v)
    widest = lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)  # noqa: E731
    torch.testing.assert_close(call(case.q.contiguous(), widest(case.k), case.v.mT.contiguous().mT), expected)
    torch.testing.assert_close(call(widest(case.q), case.k, case.v), expected)
    packed = torch.cat([case.q, case.q, case.q], dim=3)[..., 32:64]
    torch.testing.assert_close(call(packed, case.k, case.v), expected)
    for batch, length in ((0, 9), (2, 0)):
        q = torch.empty(batch, 4, length, 32, requires_grad=True)
        prefix = case.prefix_k.clone().requires_grad_()
        k = case.k[:batch]
        y = pk.functional.prefix_attention(q, k, k, prefix, case.prefix_v)
        y.sum().backward()
        assert y.shape == q.shape == q.grad.shape and not prefix.grad.any()
    without_keys = call(case.q, case.k[:, :, :0], case.v[:, :, :0])
    from_prefix = pk.reference.prefix_attention(
        case.q, case.k[:, :, :0], case.v[:, :, :0], case.prefix_k, case.prefix_v
    )
    torch.testing.assert_close(without_keys, from_prefix)


@pytest.mark.parametrize("wanted", ["q", "k", "prefix_v"])
def test_only_what_needs_a_gradient(backend, wanted):
    case = Case(SHAPES["grouped"], torch.float32, is_causal=True)
    every = case.run(pk.functional.prefix_attention)
    leaves = [getattr(case, name).detach().requires_grad_(name == wanted) for name in NAMES]
    pk.functional.prefix_attention(*leaves, **case.options).backward(case.dy)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert (leaf.grad is not None) == (name == wanted)
        if name == wanted:
            torch.testing.assert_close(leaf.grad, every[f"d{name}"])


def test_two_runs_agree_bitwise(backend):
    case = Case(SHAPES["smollm2"], torch.bfloat16, is_causal=True)
    first, again = case.run(pk.functional.prefix_attention), case.run(pk.functional.prefix_attention)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_nan_spreads(backend):
    for name in NAMES:
        case = Case(SHAPES["grouped"], torch.float32)
        getattr(case, name)[0, 0, 0] = torch.nan
        actual = pk.functional.prefix_attention(*(getattr(case, n) for n in NAMES))
        expected = pk.reference.prefix_attention(*(getattr(case, n) for n in NAMES))
        assert torch.equal(actual.isnan(), expected.isnan()), name


def test_autocast_and_checkpointing(backend):
    case = Case(SHAPES["grouped"], torch.float32, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pk.functional.prefix_attention(*(getattr(case, name) for name in NAMES))
    assert y.dtype == torch.bfloat16
    again = case.run(lambda *args, **o: checkpoint(pk.functional.prefix_attention, *args, use_reentrant=False, **o))
    once = case.run(pk.functional.prefix_attention)
    assert all(torch.equal(once[name], again[name]) for name in once)


class Allocations(TorchDispatchMode):
    """The sizes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numels = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in views:
                self.numels.add(t.untyped_storage().nbytes() // t.element_size())
        return result


def test_prefix_is_not_repeated_over_the_batch():
    """No tensor as large as batch x P x (heads D) exists, forward or backward, though that is far above all others."""
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    batch, heads, length, width, prefix = 8, 4, 4, 32, 256
    case = Case((batch, heads, heads, length, length, width, prefix), torch.bfloat16, is_causal=True)
    with Allocations() as native, pk.use_backend("native"):
        case.run(pk.functional.prefix_attention)
    repeated = batch * prefix * heads * width
    assert max(native.numels) < repeated / 4
    with Allocations() as concatenated:
        case.run(pk.reference.prefix_attention)
    assert max(concatenated.numels) >= repeated, "the measurement sees nothing"


@pytest.mark.parametrize("shape", ["grouped", "decode-grouped", "primes"])
def test_library_ops(shape):
    if reason := dispatch.why_not(OP, "native", torch.device("cpu"), ()):
        pytest.skip(reason)
    case = Case(SHAPES[shape], torch.bfloat16, torch.float32)
    tensors = [getattr(case, name) for name in NAMES]
    b, _, _, _, s, _, _ = SHAPES[shape]
    mask = torch.zeros(b, 1, 1, s, dtype=torch.bfloat16)
    forward = torch.ops.peft_kernels.prefix_attention_forward.default
    torch.library.opcheck(forward, (*tensors, mask, False, 0.1, "native"))
    out, lse = forward(*tensors, mask, False, 0.1, "native")
    backward = torch.ops.peft_kernels.prefix_attention_backward.default
    for needs in ([True] * 3, [False, False, True], [True, False, False]):
        torch.library.opcheck(backward, (case.dy, *tensors, mask, out, lse, False, 0.1, needs, "native"))


@pytest.mark.slow
def test_compile(backend):
    Case(SHAPES["grouped"], torch.bfloat16, is_causal=True).check(
        backend, torch.compile(pk.functional.prefix_attention, fullgraph=True)
    )


def test_gradcheck():
    torch.manual_seed(0)
    shapes = ((2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4), (1, 2, 4), (1, 2, 4), (1, 2, 3, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(q, k, v, prefix_k, prefix_v, mask):
        return pk.reference.prefix_attention(q, k, v, prefix_k, prefix_v, attn_mask=mask, is_causal=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_module(backend):
    torch.manual_seed(0)
    module = pk.nn.PrefixAttention(2, 5, 32)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "prefix_k": (2, 5, 32),
        "prefix_v": (2, 5, 32),
    }
    q, k = torch.randn(3, 4, 6, 32), torch.randn(3, 2, 6, 32)
    y = module(q, k, k, is_causal=True)
    y.sum().backward()
    assert module.prefix_k.grad.abs().max() > 0
    expected = pk.reference.prefix_attention(q, k, k, module.prefix_k, module.prefix_v, is_causal=True)
    torch.testing.assert_close(y, expected)
    assert "num_virtual_tokens=5" in repr(module)


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy."""

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"q": "q"}, TypeError, r"q: expected a torch.Tensor, got str"),
            ({"q": torch.randn(4, 9, 32)}, ValueError, r"q: expected 4 dimensions"),
            ({"k": torch.randn(2, 3, 9, 32)}, ValueError, r"k: expected shape \(B=2, Hkv dividing 4, S, D=32\)"),
            ({"k": torch.randn(2, 2, 9, 16)}, ValueError, r"k: expected shape"),
            ({"v": torch.randn(2, 2, 8, 32)}, ValueError, r"v: expected shape \(2, 2, 9, 32\) \(that of k\)"),
            ({"v": torch.randn(2, 2, 9, 32).bfloat16()}, ValueError, r"v: expected dtype torch.float32 \(that of q\)"),
            ({"prefix_k": torch.randn(2, 2, 5, 32)}, ValueError, r"prefix_k: expected 3 dimensions"),
            ({"prefix_k": torch.randn(4, 5, 32)}, ValueError, r"prefix_k: expected shape \(Hkv=2, P >= 1, D=32\)"),
            ({"prefix_k": torch.randn(2, 0, 32)}, ValueError, r"prefix_k: .* got \(2, 0, 32\)"),
            ({"prefix_v": torch.randn(2, 6, 32)}, ValueError, r"prefix_v: expected shape \(2, 5, 32\)"),
            ({"prefix_v": torch.randn(2, 5, 32).to("meta")}, ValueError, r"prefix_v: expected device cpu"),
            (
                {"attn_mask": torch.ones(3, 9)},
                ValueError,
                r"attn_mask: expected a shape that broadcasts.*never the pre",
            ),
            ({"attn_mask": torch.ones(9, 9).int()}, ValueError, r"attn_mask: expected a floating-point tensor"),
        ],
    )
    def test_errors(self, backend, changes, error, message):
        arguments = {
            "q": torch.randn(2, 4, 9, 32),
            "k": torch.randn(2, 2, 9, 32),
            "v": torch.randn(2, 2, 9, 32),
            "prefix_k": torch.randn(2, 5, 32),
            "prefix_v": torch.randn(2, 5, 32),
        }
        with pytest.raises(error, match=message):
            pk.functional.prefix_attention(**arguments | changes)

    def test_mask_gradient_is_refused_by_kernels(self, backend):
        case = Case(SHAPES["primes"], torch.float32, attn_mask=torch.zeros(31, 31, requires_grad=True))
        call = lambda: pk.functional.prefix_attention(*(getattr(case, n) for n in NAMES), **case.options)  # noqa: E731
        if backend == "reference":
            call().sum().backward()
            assert case.options["attn_mask"].grad.abs().max() > 0
        else:
            with pytest.raises(ValueError, match=r"attn_mask: expected a mask that needs no gradient.*reference"):
                call()
