"""The native prompt attention kernels at every instruction set of this machine, by any number of threads."""

import pytest
import torch
from test_gated_prompt_attention import Case as GatedCase
from test_prefix_attention import Case as PrefixCase

import peft_kernels as pk
from peft_kernels import native
from peft_kernels.ops.prefix_attention import library, native_calls

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or ""),
    pytest.mark.usefixtures("poison"),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# B, H, Hkv, L, S, D, P: blocks of 32 queries and units of 16 columns, whole and broken
SHAPES = {"broken": (2, 4, 2, 37, 37, 41, 19), "whole": (1, 2, 2, 64, 64, 64, 48)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    PrefixCase(shape, dtype, is_causal=True).check("native")
    GatedCase(shape, dtype, is_causal=True).check("native")
    GatedCase(shape, dtype, per_sample=True).check("native")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(33, 33), (5, 40), (40, 5)], ids=str)
def test_keys_of_each_sample(lengths, is_causal):
    """Our kernel over the keys agrees with torch's, forward and backward."""
    torch.manual_seed(0)
    length, keys = lengths
    q, dy = (torch.randn(2, length, 4, 40, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 2, keys, 40, dtype=torch.bfloat16) for _ in range(2))
    if not native_calls.own_keys(q, k, None):
        pytest.skip("torch's attention serves the keys on this machine")
    ours, theirs = (f(q, k, v, None, is_causal, 0.2) for f in (native_calls.keys_forward, library.forward))
    results = [
        (*state, *f(dy, q, k, v, *state, None, is_causal, 0.2))
        for f, state in ((native_calls.keys_backward, ours), (library.backward, theirs))
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def on_one_thread(function):
    def call(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        results = function(*args)
        torch.set_num_threads(threads)
        return results

    return call


def test_threads_do_not_change_the_result(monkeypatch):
    """torch's attention over the keys, where it is taken, stays on one thread: its sums may depend on their number."""
    before = torch.get_num_threads()
    for name in ("forward", "backward"):
        monkeypatch.setattr(library, name, on_one_thread(getattr(library, name)))
    cases = [
        (PrefixCase((2, 4, 2, 300, 300, 32, 20), torch.bfloat16, is_causal=True), pk.functional.prefix_attention),
        (PrefixCase((2, 4, 2, 300, 300, 32, 20), torch.float32), pk.functional.prefix_attention),
        (GatedCase((2, 4, 1, 300, 300, 32, 20), torch.bfloat16), pk.functional.gated_prompt_attention),
    ]
    try:
        for case, function in cases:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with pk.use_backend("native"):
                    results.append(case.run(function))
            for other in results[1:]:
                for name, value in results[0].items():
                    assert torch.equal(value, other[name]), name
    finally:
        torch.set_num_threads(before)


def test_arguments_are_checked():
    call = native.load().prompt_attention_forward
    heads = (0, 0, 0, 0)
    shape = (0, 0, 1, 2, 1, 1, 32, 4, False, False, 1.0)
    with pytest.raises(ValueError, match="null argument"):
        call(shape, heads, heads, heads, heads, 0, 0, heads)
    with pytest.raises(ValueError, match="positive sizes"):
        call((*shape[:5], 0, *shape[6:]), heads, heads, heads, heads, 0, 0, heads)
    with pytest.raises(ValueError, match="Hkv must divide H"):
        call((*shape[:4], 3, *shape[5:]), heads, heads, heads, heads, 0, 0, heads)
    with pytest.raises(ValueError, match="dtype code 7"):
        call((7, *shape[1:]), heads, heads, heads, heads, 0, 0, heads)
