"""The native side GEMMs of a LoRA layer, at every instruction set of this machine, against float64 and eager torch."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peft_kernels import dropout, native
from peft_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or "")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = [1, 3, 8, 16, 17, 64, 256]
ROWS = [1, 2, 5, 13, 14, 64, 257]
COLUMNS = [1, 7, 64, 100, 576]
SEED = -0x123456789ABCDEF
GUARD = 3  # poisoned columns to the right of every strided matrix


@pytest.fixture(autouse=True)
def one_thread():
    """What a shape computes does not depend on the threads, and busy test machines make their barriers slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def strided(rows, columns, dtype, scale=1.0):
    """Random values beside NaN guard columns."""
    buffer = torch.full((rows, columns + GUARD), float("nan"), dtype=dtype)
    buffer[:, :columns] = (torch.randn(rows, columns) * scale).to(dtype)
    return buffer[:, :columns]


def poisoned(rows, columns):
    return torch.full((rows, columns + GUARD), float("nan"))


@functools.cache
def mask(rows, columns, p, seed=SEED):
    return dropout.scale_mask(torch.tensor(seed), rows, columns, p) if p else torch.ones(rows, columns).double()


def matrix(t):
    return t.data_ptr(), native.dtype_code(t.dtype)


def shrink(x, p, *, p_is_kr=False, alpha=1.0, dropout_p=0.0):
    (rows, columns), rank = x.shape, p.shape[1 if p_is_kr else 0]
    out = poisoned(rows, rank)
    x_ptr, x_code = matrix(x)
    native.load().lora_shrink(
        x_ptr, x_code, rows, columns, x.stride(0), *matrix(p), p_is_kr, rank, alpha, dropout_p, SEED % 2**64,
        out.data_ptr(), out.stride(0),
    )  # fmt: skip
    assert out[:, rank:].isnan().all()
    return out[:, :rank]


def wgrad(x, p, *, out_dtype=torch.float32, out_is_ri=False, alpha=1.0, dropout_p=0.0):
    (rows, columns), rank = x.shape, p.shape[1]
    shape = (rank, columns) if out_is_ri else (columns, rank)
    buffer = torch.full((rank * columns + 16,), float("nan"), dtype=out_dtype)
    x_ptr, x_code = matrix(x)
    native.load().lora_wgrad(
        x_ptr, x_code, rows, columns, x.stride(0), p.data_ptr(), p.stride(0), rank, alpha, dropout_p, SEED % 2**64,
        *matrix(buffer), out_is_ri,
    )  # fmt: skip
    assert buffer[rank * columns :].isnan().all()
    return buffer[: rank * columns].reshape(shape)


def expand_add(out, terms):
    """Adds in place; a term is (S, P, p_is_nr, alpha, dropout_p)."""
    rows, columns = out.shape
    wired = [
        (s.data_ptr(), s.stride(0), *matrix(p), p_is_nr, s.shape[1], alpha, dropout_p, (SEED + i) % 2**64)
        for i, (s, p, p_is_nr, alpha, dropout_p) in enumerate(terms)
    ]
    native.load().lora_expand_add(*matrix(out), rows, columns, out.stride(0), wired)
    return out


def check(samples, what):
    """The budget over (actual, exact, eager) triples: one element's error is luck, so small shapes come many times."""
    actual, exact, eager = (torch.cat([t.flatten() for t in column]) for column in zip(*samples, strict=True))
    assert_within_budget(actual, exact, eager, what)


def repeats(outputs):
    return range(max(1, 64 // outputs))


def numpy_philox(counter, key):
    """Philox4x32-10 on Python integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def native_mask(seed, rows, columns, p):
    out = torch.full((rows, columns), float("nan"))
    native.load().philox_mask(seed % 2**64, rows, columns, p, out.data_ptr())
    return out


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    assert numpy_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert numpy_philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.999, 1.0])
def test_mask_is_philox(isa, p):
    rows, columns = 5, 107
    seed = SEED % 2**64
    words = np.array(
        [[numpy_philox([k >> 2, m, 0, 0], [seed % 2**32, seed >> 32])[k & 3] for k in range(columns)]
         for m in range(rows)], dtype=np.uint64,
    )  # fmt: skip
    expected = np.where(words >= np.uint64(int(p * 2**32)), 1 / (1 - p) if p < 1 else 0.0, 0.0).astype(np.float32)
    np.testing.assert_array_equal(native_mask(SEED, rows, columns, p).numpy(), expected)


def test_mask_is_the_reference_mask(isa):
    for rows, columns, p in [(1, 1, 0.3), (3, 64, 0.1), (33, 577, 0.5)]:
        expected = dropout.scale_mask(torch.tensor(SEED), rows, columns, p).float()
        assert torch.equal(native_mask(SEED, rows, columns, p), expected)


SHAPES = sorted(
    {(rows, columns, 16) for rows, columns in itertools.product(ROWS, COLUMNS)}
    | {(rows, 100, rank) for rows, rank in itertools.product(ROWS, RANKS)}
    | {(64, 1100, 17), (1100, 33, 8)}
)


@pytest.mark.parametrize("p_is_kr", [False, True], ids=["rk", "kr"])
@pytest.mark.parametrize("p_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_shrink(isa, x_dtype, p_dtype, p_is_kr):
    torch.manual_seed(0)
    wide = torch.promote_types(x_dtype, p_dtype)
    for (rows, columns, rank), dropout_p in itertools.product(SHAPES, (0.0, 0.1, 1.0)):
        keep, samples = mask(rows, columns, dropout_p), []
        for _ in repeats(rows * rank):
            x, p = strided(rows, columns, x_dtype), torch.randn(rank, columns).to(p_dtype)
            exact = 0.5 * (x.double() * keep) @ p.double().T
            eager = 0.5 * ((x * keep.to(x_dtype)).to(wide) @ p.T.to(wide)).float()
            actual = shrink(x, p.T.contiguous() if p_is_kr else p, p_is_kr=p_is_kr, alpha=0.5, dropout_p=dropout_p)
            samples.append((actual, exact, eager))
        check(samples, f"{rows}x{columns} r{rank} p{dropout_p}")


@pytest.mark.parametrize("out_is_ri", [False, True], ids=["ir", "ri"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_wgrad(isa, x_dtype, out_dtype, out_is_ri):
    torch.manual_seed(1)
    for (rows, columns, rank), dropout_p in itertools.product(SHAPES, (0.0, 0.1, 1.0)):
        keep, samples = mask(rows, columns, dropout_p), []
        for _ in repeats(columns * rank):
            x, p = strided(rows, columns, x_dtype), strided(rows, rank, torch.float32)
            exact = 0.5 * (x.double() * keep).T @ p.double()
            eager = (0.5 * (x * keep.to(x_dtype)).float().T @ p).to(out_dtype)
            actual = wgrad(x, p, out_dtype=out_dtype, out_is_ri=out_is_ri, alpha=0.5, dropout_p=dropout_p)
            samples.append((actual.T if out_is_ri else actual, exact, eager))
        check(samples, f"{rows}x{columns} r{rank} p{dropout_p}")


@pytest.mark.parametrize("p_is_nr", [False, True], ids=["rn", "nr"])
@pytest.mark.parametrize("p_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_add(isa, dtype, p_dtype, p_is_nr):
    torch.manual_seed(2)
    every = ((0.0,), (0.1,), (0.0, 0.0), (0.1, 1.0, 0.3))
    for (rows, columns, rank), dropouts in itertools.product(SHAPES, every):
        samples = []
        for _ in repeats(rows * columns):
            out = strided(rows, columns, dtype)
            exact, eager, terms = out.double(), out.clone(), []
            for i, dropout_p in enumerate(dropouts):
                s = strided(rows, rank + i, torch.float32)
                p = torch.randn(rank + i, columns).to(p_dtype)
                keep = mask(rows, columns, dropout_p, SEED + i)
                exact = exact + 0.5 * keep * (s.double() @ p.double())
                # not by a dot product, which some machines sum in more lanes than any matrix product
                product = (s @ F.pad(p.float(), (0, 1)))[:, :columns]
                eager = (eager.float() + 0.5 * keep.float() * product).to(dtype)
                terms.append((s, p.T.contiguous() if p_is_nr else p, p_is_nr, 0.5, dropout_p))
            expand_add(out, terms)
            assert out._base[:, columns:].isnan().all()
            samples.append((out, exact, eager))
        check(samples, f"{rows}x{columns} r{rank} p{dropouts}")


def test_thread_count_does_not_matter(isa):
    torch.manual_seed(3)
    results = []
    for rows, columns, rank in [(200, 1000, 33), (3000, 40, 16), (700, 2080, 8)]:
        x, p = strided(rows, columns, torch.bfloat16), torch.randn(rank, columns)
        q, base = torch.randn(rows, rank), torch.randn(rows, columns).bfloat16()
        for dropout_p in (0.0, 0.1):
            results.append([])
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                out = expand_add(base.clone(), [(q, p, False, 1.0, dropout_p)])
                results[-1].append((shrink(x, p, dropout_p=dropout_p), wgrad(x, q, dropout_p=dropout_p), out))
    for first, *others in results:
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_stay_in_their_place(isa, value):
    for dtype, dropout_p in itertools.product(DTYPES, (0.0, 1.0)):
        x = torch.randn(20, 70).to(dtype)
        x[4, 69] = value
        dropped = x.double() * mask(20, 70, dropout_p)
        p, q = torch.randn(5, 70), torch.randn(20, 5)
        for actual, exact in (
            (shrink(x, p, dropout_p=dropout_p), dropped @ p.double().T),
            (wgrad(x, q, dropout_p=dropout_p), dropped.T @ q.double()),
            (expand_add(x.clone(), [(q, p, False, 1.0, 0.0)]), x.double() + q.double() @ p.double()),
        ):
            assert torch.equal(actual.isnan(), exact.isnan())
            assert torch.equal(actual.isinf(), exact.isinf())


def test_empty(isa):
    x, p = torch.randn(0, 8), torch.randn(4, 8)
    assert shrink(x, p).shape == (0, 4)
    assert torch.equal(wgrad(x, torch.randn(0, 4)), torch.zeros(8, 4))
    assert torch.equal(shrink(torch.randn(5, 0), torch.randn(4, 0)), torch.zeros(5, 4))
    out = torch.randn(3, 8)
    assert torch.equal(expand_add(out.clone(), []), out)


BAD = {
    "null x": (dict(x=0), "x is null"),
    "stride": (dict(ldx=7), "row stride 7"),
    "dtype": (dict(x_dtype=3), "dtype code 3"),
    "negative": (dict(M=-1), "negative size"),
    "overflow": (dict(M=2**40, ldx=2**40), "too large"),
    "dropout above one": (dict(dropout_p=1.5), "dropout_p must be in"),
    "dropout nan": (dict(dropout_p=float("nan")), "dropout_p must be in"),
    "null S": (dict(S=0), "S is null"),
    "null P": (dict(P=0), "P is null"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    x, p, out = torch.randn(5, 8), torch.randn(4, 8), poisoned(5, 4)
    arguments = dict(
        x=x.data_ptr(), x_dtype=0, M=5, K=8, ldx=8, P=p.data_ptr(), p_dtype=0, p_is_kr=False, r=4, alpha=1.0,
        dropout_p=0.0, seed=0, S=out.data_ptr(), ldS=7,
    )  # fmt: skip
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        native.load().lora_shrink(**{**arguments, **changed})
    assert out.isnan().all()


def test_bad_arguments_of_the_others():
    module, t = native.load(), torch.randn(8, 8)
    pointer = t.data_ptr()
    before = t.clone()
    with pytest.raises(ValueError, match="lora_wgrad: out is null"):
        module.lora_wgrad(pointer, 0, 8, 8, 8, pointer, 4, 4, 1.0, 0.0, 0, 0, 0, False)
    with pytest.raises(ValueError, match="lora_wgrad: P has row stride 3"):
        module.lora_wgrad(pointer, 0, 8, 8, 8, pointer, 3, 4, 1.0, 0.0, 0, pointer, 0, False)
    with pytest.raises(ValueError, match="lora_expand_add: S has row stride 1"):
        module.lora_expand_add(pointer, 0, 8, 8, 8, [(pointer, 1, pointer, 0, True, 4, 1.0, 0.0, 0)])
    with pytest.raises(ValueError, match="philox_mask: dropout_p must be in"):
        module.philox_mask(0, 8, 8, -0.1, pointer)
    assert torch.equal(t, before)
