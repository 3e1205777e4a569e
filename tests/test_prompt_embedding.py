"""prompt_embedding: values and every gradient against float64, and the contract around them."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels import dispatch, native
from peft_kernels.testing import assert_within_budget

OP = "prompt_embedding"
# B, L, P, vocabulary, hidden: one row, primes, non-multiples of 64, more columns than a block of sums, a real width
SHAPES = {
    "one-row": (1, 1, 1, 3, 5),
    "primes": (3, 7, 5, 11, 13),
    "odd-width": (2, 33, 10, 50, 577),
    "wide": (4, 19, 20, 300, 2051),
    "smollm2": (4, 64, 20, 2000, 576),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(shape, dtype, prompt_dtype=None):
    b, l, p, v, h = shape
    torch.manual_seed(b * l + h)
    ids = torch.randint(0, v, (b, l))
    return ids, torch.randn(v, h).to(dtype), torch.randn(p, h).to(prompt_dtype or dtype)


def gradients(function, ids, weight, prompt):
    """y, dE and dprompt of one call."""
    weight, prompt = weight.detach().requires_grad_(), prompt.detach().requires_grad_()
    y = function(ids, weight, prompt)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (weight, prompt), dy)


def truth(ids, weight, prompt):
    """The same in float64, with the upstream gradient that the kernel's dtype gives."""
    leaf, shared = weight.double().requires_grad_(), prompt.to(weight.dtype).double().requires_grad_()
    y = pk.reference.prompt_embedding(ids, leaf, shared)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype).double()
    return y.detach(), *torch.autograd.grad(y, (leaf, shared), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, shape, dtype):
    ids, weight, prompt = inputs(shape, dtype)
    ours = gradients(pk.functional.prompt_embedding, ids, weight, prompt)
    eager = gradients(pk.reference.prompt_embedding, ids, weight, prompt)
    assert torch.equal(ours[0], eager[0])  # rows are copied
    for name, a, t, e in zip(("y", "dE", "dprompt"), ours, truth(ids, weight, prompt), eager, strict=True):
        assert_within_budget(a, t, e, name)
        assert a.abs().max() > 0


@pytest.mark.parametrize("prompt_dtype", [torch.float32, torch.float16], ids=str)
def test_prompt_of_another_dtype(backend, prompt_dtype):
    ids, weight, prompt = inputs((3, 5, 4, 9, 70), torch.bfloat16, prompt_dtype)
    y, _, dprompt = gradients(pk.functional.prompt_embedding, ids, weight, prompt)
    expected, _, exact = truth(ids, weight, prompt)
    assert torch.equal(y.double(), expected) and dprompt.dtype == prompt_dtype
    if prompt_dtype is torch.float32 and backend != "reference":  # one rounding, of float32 sums
        torch.testing.assert_close(dprompt.double(), exact, rtol=1e-6, atol=1e-6)


def test_strides_and_int32_ids(backend):
    ids, weight, prompt = inputs((2, 6, 3, 9, 40), torch.float32)
    expected = gradients(pk.functional.prompt_embedding, ids, weight, prompt)
    wide = torch.randn(9, 100)
    wide[:, :40] = weight
    layouts = {"columns": weight.t().contiguous().t(), "slice": wide[:, :40]}
    for name, view in layouts.items():
        for a, b in zip(gradients(pk.functional.prompt_embedding, ids, view, prompt), expected, strict=True):
            assert torch.equal(a, b), name
    transposed = ids.t().contiguous().t()
    assert torch.equal(
        pk.functional.prompt_embedding(transposed.int(), weight, prompt.t().contiguous().t()), expected[0]
    )
    leaf = prompt.clone().requires_grad_()
    pk.functional.prompt_embedding(ids, weight, leaf).sum().backward()  # an expanded gradient
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty(backend, shape):
    ids, weight, prompt = inputs((*shape, 9, 40), torch.float32)
    y, dweight, dprompt = gradients(pk.functional.prompt_embedding, ids, weight, prompt)
    assert y.shape == (shape[0], shape[2] + shape[1], 40)
    assert dprompt.shape == prompt.shape and (shape[0] > 0 or not dprompt.any())
    assert dweight.any() == (ids.numel() > 0)


def test_two_runs_and_any_number_of_threads_agree_bitwise(backend):
    arguments = inputs((8, 64, 16, 20, 600), torch.bfloat16)  # few ids: long sums
    expected = gradients(pk.functional.prompt_embedding, *arguments)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(gradients(pk.functional.prompt_embedding, *arguments), expected, strict=True):
            assert torch.equal(a, b)
    torch.set_num_threads(before)


def test_nan_and_inf_stay_where_they_are(backend):
    ids, weight, prompt = inputs((2, 5, 3, 9, 40), torch.bfloat16)
    weight[ids[1, 2]], prompt[1, 3] = float("nan"), float("inf")
    y = pk.functional.prompt_embedding(ids, weight, prompt)
    expected = pk.reference.prompt_embedding(ids, weight, prompt)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y.isnan().any() and y.isinf().any()


def test_saves_only_what_backward_needs(backend):
    if backend == "reference":
        pytest.skip("the reference path saves what torch saves")
    ids, weight, prompt = inputs((2, 5, 3, 9, 40), torch.float32)
    for trained, expected in ((False, 0), (True, ids.numel())):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            pk.functional.prompt_embedding(ids, weight.requires_grad_(trained), prompt.requires_grad_())
        assert sum(t.numel() for t in saved) == expected


def test_autocast_and_checkpointing(backend):
    ids, weight, prompt = inputs((2, 5, 3, 9, 40), torch.float32)
    expected = gradients(pk.functional.prompt_embedding, ids, weight, prompt)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(pk.functional.prompt_embedding, *arguments, use_reentrant=False)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(checkpointed, ids, weight, prompt)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.skipif(native.why_not() is not None, reason="no native core")
def test_native_writes_its_rows_alone():
    ids, weight, prompt = inputs((2, 5, 3, 9, 41), torch.bfloat16)
    implementation = dispatch.implementation(OP, "native")
    guarded = torch.full((2 * 8 + 1, 41), float("nan"), dtype=torch.bfloat16)
    implementation.forward(ids, weight, prompt, guarded[:16].view(2, 8, 41))
    assert not guarded[:16].isnan().any() and guarded[16].isnan().all()
    sums = torch.full((4, 41), float("nan"))
    implementation.dprompt(guarded[:16].view(2, 8, 41), sums[:3])
    assert torch.equal(sums[:3], 2 * prompt.float()) and sums[3].isnan().all()


@pytest.mark.skipif(native.why_not() is not None, reason="no native core")
def test_library_ops():
    ids, weight, prompt = inputs((2, 5, 3, 9, 40), torch.bfloat16)
    dy, ops = torch.randn(2, 8, 40), torch.ops.peft_kernels
    torch.library.opcheck(ops.prompt_embedding_forward.default, (ids, weight, prompt, "native"))
    torch.library.opcheck(ops.prompt_embedding_dprompt.default, (dy, 3, torch.bfloat16, "native"))
    torch.library.opcheck(ops.prompt_embedding_dweight.default, (dy[:, 3:], ids, 9, "native"))


@pytest.mark.slow
def test_compile(backend):
    arguments = inputs((2, 5, 3, 9, 40), torch.bfloat16)
    compiled = torch.compile(pk.functional.prompt_embedding, fullgraph=True)
    ours = gradients(compiled, *arguments)
    for a, b in zip(ours, gradients(pk.functional.prompt_embedding, *arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    ids, weight, prompt = inputs((2, 3, 2, 4, 3), torch.float64)
    leaves = (weight.requires_grad_(), prompt.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, p: pk.reference.prompt_embedding(ids, w, p), leaves)
    assert torch.autograd.gradgradcheck(lambda w, p: pk.reference.prompt_embedding(ids, w, p), leaves)


class TestBadInput:
    """Each error names the argument, what was expected, what came and the remedy."""

    def setup_method(self):
        self.ids, self.weight, self.prompt = inputs((2, 5, 3, 9, 40), torch.float32)

    @pytest.mark.parametrize("bad", [-1, 9, 2**40])
    def test_ids_outside_the_vocabulary(self, backend, bad):
        self.ids[1, 2] = bad
        with pytest.raises(ValueError, match=rf"input_ids: expected ids from 0 to 8, got {bad}. Tokenize"):
            pk.functional.prompt_embedding(self.ids, self.weight, self.prompt)

    def test_types(self):
        with pytest.raises(TypeError, match=r"input_ids: expected a torch.Tensor, got list"):
            pk.functional.prompt_embedding([[1]], self.weight, self.prompt)
        with pytest.raises(ValueError, match=r"input_ids: expected int64 or int32, got torch.float32"):
            pk.functional.prompt_embedding(self.ids.float(), self.weight, self.prompt)
        with pytest.raises(ValueError, match=r"prompt: expected a floating-point tensor, got torch.int64"):
            pk.functional.prompt_embedding(self.ids, self.weight, self.prompt.long())

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"input_ids: expected shape \(B, L\), got \(5,\)"):
            pk.functional.prompt_embedding(self.ids[0], self.weight, self.prompt)
        with pytest.raises(ValueError, match=r"prompt: expected shape \(3, 40\), got \(3, 39\)"):
            pk.functional.prompt_embedding(self.ids, self.weight, self.prompt[:, 1:])

    def test_device(self):
        with pytest.raises(ValueError, match=r"prompt: expected device cpu.*got meta"):
            pk.functional.prompt_embedding(self.ids, self.weight, self.prompt.to("meta"))

    def test_named_backend_never_falls_back(self):
        with pk.use_backend("native"), pytest.raises(pk.BackendError, match=r"native.*prompt_embedding"):
            pk.functional.prompt_embedding(self.ids, self.weight.double(), self.prompt.double())
