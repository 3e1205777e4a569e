"""The native codec at every instruction-set level, bit for bit against a NumPy oracle and against bitsandbytes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from peft_kernels import native
from peft_kernels.ops.nf4.reference import code_book, dynamic_map

core = native.load()
if core is None:
    pytest.skip(native.why_not(), allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANT_TYPES = ["nf4", "fp4"]
BLOCKSIZES = [2, 6, 32, 48, 64, 100, 128, 4096]
SIZES = [1, 2, 31, 64, 65, 127, 4096, 5001, 12345]
GUARD = 67  # elements past the end that must stay untouched


@pytest.fixture(scope="module")
def bnb():
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallback anew for every shape
        yield functional


def bits(t):
    return t.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()])


def sample(n, dtype, seed=0):
    """Normal values with a run of zeros (whole zero blocks at the smaller blocksizes) and a zero at the end."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x[n // 3 : n // 3 + 150] = 0
    x[-1:] = 0
    return x.to(dtype)


def quantize(x, blocksize, quant_type):
    n = x.numel()
    packed = torch.full(((n + 1) // 2 + GUARD,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((-(-n // blocksize) + GUARD,), -7.0)
    core.quantize_4bit(
        x.data_ptr(),
        native.dtype_code(x.dtype),
        n,
        blocksize,
        QUANT_TYPES.index(quant_type),
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    assert (packed[-GUARD:] == 0xA5).all() and (absmax[-GUARD:] == -7.0).all()
    return packed[:-GUARD], absmax[:-GUARD]


def quantize_oracle(x, blocksize, quant_type):
    code = code_book(quant_type, torch.device("cpu")).numpy()
    order = np.argsort(code, kind="stable")
    bounds = (code[order][:-1] + code[order][1:]) / np.float32(2)
    values, nibbles, absmax = x.float().numpy(), [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        top = np.abs(block).max()
        divisor = np.maximum(top, np.float32(1e-38))
        partial = len(block) < blocksize
        absmax.append(divisor if partial else top)
        scaled = block / divisor if partial else block * (np.float32(1) / divisor)
        # searchsorted counts the bounds below, and puts a NaN behind them all
        nibbles.append(order[np.searchsorted(bounds, scaled, side="left")])
    nibbles = np.concatenate([*nibbles, order[np.searchsorted(bounds, np.zeros(len(values) % 2), side="left")]])
    packed = (nibbles[::2] << 4 | nibbles[1::2]).astype(np.uint8)
    return torch.from_numpy(packed), torch.from_numpy(np.array(absmax, dtype=np.float32))


def weight4(packed, absmax, n, blocksize, quant_type, nested=None):
    absmax2, code2, offset, nested_blocksize = nested or (None, None, None, 0)
    pointers = [0 if t is None else t.data_ptr() for t in (packed, absmax, absmax2, code2, offset)]
    return core.Weight4(*pointers, nested_blocksize, QUANT_TYPES.index(quant_type), 1, n, blocksize)


def dequantize(weight, begin, end, dtype):
    out = torch.full((end - begin + GUARD,), float("nan"), dtype=dtype)
    core.dequantize_4bit(weight, begin, end, out.data_ptr(), native.dtype_code(dtype))
    assert out[end - begin :].isnan().all(), "wrote past the end"
    return out[: end - begin]


def dequantize_oracle(packed, scale, n, blocksize, quant_type, dtype):
    nibbles = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=1).reshape(-1)[:n]
    values = code_book(quant_type, torch.device("cpu")).numpy()[nibbles]
    return torch.from_numpy(values * np.repeat(scale.numpy(), blocksize)[:n]).to(dtype)


def assert_same(ours, theirs):
    """Equal values; a zero's sign is free, because bitsandbytes gives FP4's code 8 either sign."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan], theirs[~nan])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_is_the_oracles(isa, dtype, blocksize, quant_type):
    for n in SIZES:
        x = sample(n, dtype)
        packed, absmax = quantize(x, blocksize, quant_type)
        packed_oracle, absmax_oracle = quantize_oracle(x, blocksize, quant_type)
        assert torch.equal(packed, packed_oracle)
        assert torch.equal(bits(absmax), bits(absmax_oracle))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_at_the_bounds(isa, quant_type):
    """Every decision bound and its two neighbours, in full blocks whose absmax is 1."""
    code = code_book(quant_type, torch.device("cpu")).numpy()
    bounds = (np.sort(code)[:-1] + np.sort(code)[1:]) / np.float32(2)
    values = [bounds, np.nextafter(bounds, np.float32(2)), np.nextafter(bounds, np.float32(-2)), [1.0, -0.0, 0.0]]
    x = torch.from_numpy(np.concatenate(values).astype(np.float32))
    for part in (x[:32], x[16:], x[:-1]):
        part = torch.cat([part, torch.ones(-len(part) % 32)])
        assert torch.equal(quantize(part, 32, quant_type)[0], quantize_oracle(part, 32, quant_type)[0])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e-42, 1e-38, 3e38])
def test_quantize_special_values(isa, special, quant_type):
    """A NaN or an infinity spoils its own block alone; tiny and huge blocks keep their scale."""
    x = sample(64 * 5 + 7, torch.float32)
    x[64:128] *= 1e-42
    x[70] = x[-2] = special
    with np.errstate(all="ignore"):
        packed_oracle, absmax_oracle = quantize_oracle(x, 64, quant_type)
    packed, absmax = quantize(x, 64, quant_type)
    assert torch.equal(packed, packed_oracle)
    assert_same(absmax, absmax_oracle)


def test_zero_blocks_store_the_code_of_zero(isa):
    for quant_type, byte in (("nf4", 0x77), ("fp4", 0x00)):
        packed, absmax = quantize(torch.zeros(64 + 9), 64, quant_type)
        assert (packed == byte).all()
        assert absmax.tolist() == [0.0, np.float32(1e-38)]  # a partial block's absmax is clamped, as in bitsandbytes


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_the_oracles(isa, dtype, blocksize, quant_type):
    for n in SIZES:
        packed, absmax = quantize(sample(n, torch.float32), blocksize, quant_type)
        weight = weight4(packed, absmax, n, blocksize, quant_type)
        expected = dequantize_oracle(packed, absmax, n, blocksize, quant_type, dtype)
        for begin, end in {(0, n), (n // 3, n), (n // 3 + 1, n - n // 5), (n - 1, n), (n // 2, n // 2)}:
            assert_same(dequantize(weight, begin, end, dtype), expected[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested_blocksize", [3, 64, 256])
def test_dequantize_nested(isa, nested_blocksize, dtype):
    n, blocksize = 64 * 700 + 11, 64
    blocks = -(-n // blocksize)
    g = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=g)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
    absmax2 = torch.rand(-(-blocks // nested_blocksize), generator=g)
    code2, offset = dynamic_map(torch.device("cpu")), torch.tensor(0.73)
    scale = code2.numpy()[codes.numpy()] * np.repeat(absmax2.numpy(), nested_blocksize)[:blocks] + offset.numpy()
    weight = weight4(packed, codes, n, blocksize, "nf4", (absmax2, code2, offset, nested_blocksize))
    expected = dequantize_oracle(packed, torch.from_numpy(scale), n, blocksize, "nf4", dtype)
    for begin, end in ((0, n), (64 * 257 + 5, n - 3), (64 * 699, n)):
        assert_same(dequantize(weight, begin, end, dtype), expected[begin:end])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_special_scales(isa, dtype, quant_type):
    """Rounding at the ends of each type's range: subnormals, overflow, infinity and NaN, for each of the 16 codes."""
    scale = torch.tensor(
        [0.0, 1e-45, 1e-41, 1e-39, 3e-8, 6e-5, 65504.0, 65530.0, 3.4e38, float("inf"), float("nan"), -1]
    )
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scale))
    weight = weight4(packed, scale, 512 * len(scale), 512, quant_type)
    with np.errstate(all="ignore"):
        expected = dequantize_oracle(packed, scale, 512 * len(scale), 512, quant_type, dtype)
    assert_same(dequantize(weight, 0, 512 * len(scale), dtype), expected)


@pytest.mark.parametrize("nested_blocksize", [7, 256])
def test_quantize_nested_takes_the_nearest_code(nested_blocksize):
    n = 256 * 20 + 13
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(2)) + 1
    absmax[512:768] = absmax[0] = 1.5  # with this offset, a group of zeros
    offset, code2 = torch.tensor(1.5), dynamic_map(torch.device("cpu"))
    codes = torch.full((n + GUARD,), 99, dtype=torch.uint8)
    absmax2 = torch.full((-(-n // nested_blocksize) + GUARD,), -7.0)
    core.quantize_nested(
        absmax.data_ptr(),
        n,
        offset.data_ptr(),
        code2.data_ptr(),
        nested_blocksize,
        codes.data_ptr(),
        absmax2.data_ptr(),
    )
    assert (codes[n:] == 99).all() and (absmax2[-GUARD:] == -7.0).all()
    centred = (absmax - offset).numpy()
    top = np.array([np.abs(centred[i : i + nested_blocksize]).max() for i in range(0, n, nested_blocksize)])
    assert np.array_equal(absmax2[:-GUARD].numpy(), top)
    scaled = centred * np.repeat(np.float32(1) / np.maximum(top, np.float32(1e-38)), nested_blocksize)[:n]
    exact = code2.numpy().astype(np.float64)
    distance = np.abs(scaled.astype(np.float64)[:, None] - exact)
    assert np.array_equal(codes[:n].numpy(), distance.argmin(axis=1))  # argmin takes the lower of two


def test_threads_agree(threads):
    n = 64 * 9001 + 33
    x = sample(n, torch.bfloat16)
    packed, absmax = quantize(x, 64, "nf4")
    packed_oracle, absmax_oracle = quantize_oracle(x, 64, "nf4")
    assert torch.equal(packed, packed_oracle) and torch.equal(absmax, absmax_oracle)
    weight = weight4(packed, absmax, n, 64, "nf4")
    for begin in (0, 12345):
        expected = dequantize_oracle(packed, absmax, n, 64, "nf4", torch.bfloat16)[begin:]
        assert_same(dequantize(weight, begin, n, torch.bfloat16), expected)


@pytest.mark.parametrize("offset", [0, 1])
def test_large_outputs_are_written_around_the_cache(offset):
    n = (32 << 20) + 64 * 5 + 3
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64))
    weight = weight4(packed, absmax, n, 64, "nf4")
    whole = torch.empty(n + offset, dtype=torch.bfloat16)[offset:]
    core.dequantize_4bit(weight, 0, n, whole.data_ptr(), 2)
    for begin in range(0, n, n // 7):
        end = min(n, begin + n // 7)
        assert torch.equal(dequantize(weight, begin, end, torch.bfloat16), whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024, 4096])
def test_bitsandbytes_agrees(isa, bnb, blocksize, quant_type, dtype):
    for shape in ((1, 1), (7, 9), (64, 64), (33, 66), (3, 4096)):
        x = sample(shape[0] * shape[1], dtype).view(shape)
        packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        ours, absmax = quantize(x, blocksize, quant_type)
        assert torch.equal(ours, packed.view(-1))
        assert torch.equal(bits(absmax), bits(state.absmax))
        if shape[1] < blocksize and shape[1] % 32 == 0:
            continue  # bitsandbytes' AVX-512 decoder reads the wrong scales where a block spans several rows
        weight = weight4(ours, absmax, x.numel(), blocksize, quant_type)
        assert_same(dequantize(weight, 0, x.numel(), dtype), bnb.dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitsandbytes_nested_state_decodes_alike(isa, bnb, dtype):
    x = sample(96 * 1024, dtype).view(96, 1024)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    nested = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    weight = weight4(packed, state.absmax, x.numel(), 64, "nf4", nested)
    assert_same(dequantize(weight, 0, x.numel(), dtype), bnb.dequantize_4bit(packed, state).view(-1))


def test_bad_arguments_raise():
    x, packed, absmax = torch.zeros(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    good = (x.data_ptr(), 0, 64, 64, 0, packed.data_ptr(), absmax.data_ptr())
    wrong = {
        0: (0, "null"),
        1: (3, "dtype"),
        2: (-1, "numel"),
        3: (63, "blocksize"),
        4: (2, "quant_type"),
        6: (0, "null"),
    }
    for position, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            core.quantize_4bit(*good[:position], value, *good[position + 1 :])
    weight = weight4(packed, absmax, 64, 64, "nf4")
    for begin, end in ((-1, 4), (5, 4), (0, 65)):
        with pytest.raises(ValueError, match="outside"):
            core.dequantize_4bit(weight, begin, end, x.data_ptr(), 0)
    with pytest.raises(ValueError, match="out must not be null"):
        core.dequantize_4bit(weight, 0, 64, 0, 0)
    with pytest.raises(ValueError, match="nested_blocksize"):
        core.quantize_nested(absmax.data_ptr(), 1, absmax.data_ptr(), x.data_ptr(), 0, packed.data_ptr(), x.data_ptr())
    for change, message in (
        ({"blocksize": 0}, "blocksize"),
        ({"N": -1}, "negative"),
        ({"N": 1 << 40, "K": 1 << 40}, "overflows"),
        ({"packed": 0}, "null"),
        ({"absmax2": absmax.data_ptr()}, "nested"),
        ({"code2": absmax.data_ptr()}, "absmax2"),
    ):
        fields = dict(packed=packed.data_ptr(), absmax=absmax.data_ptr(), absmax2=0, code2=0, offset=0)
        fields |= dict(nested_blocksize=0, quant_type=0, N=1, K=64, blocksize=64)
        with pytest.raises(ValueError, match=message):
            core.Weight4(**(fields | change))


def test_nothing_to_do_touches_nothing():
    core.quantize_4bit(0, 0, 0, 64, 0, 0, 0)
    core.quantize_nested(0, 0, 0, 0, 256, 0, 0)
    core.dequantize_4bit(core.Weight4(0, 0, 0, 0, 0, 0, 0, 0, 64, 64), 0, 0, 0, 0)


def test_levels_can_be_lowered_and_misspelling_is_an_error(isa):
    assert core.isa() == isa
    with pytest.raises(ValueError, match="expected scalar, avx2"):
        core.set_isa("sse9")
    with pytest.raises(TypeError, match="float64"):
        native.dtype_code(torch.float64)


@pytest.mark.parametrize("name, expected", [("scalar", "scalar"), ("sse9", "PEFT_KERNELS_ISA='sse9'")])
def test_environment_lowers_the_level(name, expected):
    command = "from peft_kernels import native; print(native.load().isa())"
    env = os.environ | {"PEFT_KERNELS_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert expected in (run.stdout if run.returncode == 0 else run.stderr.splitlines()[-1])
