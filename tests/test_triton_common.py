"""What the Triton kernels share: the byte-permute decode, the recorded launches, and the run in the interpreter."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from peft_kernels import triton_common
from peft_kernels.ops.nf4.reference import CODES
from peft_kernels.triton_common import interpreting, launch
from peft_kernels.triton_common.decode import MULTIPLIER, decode_asm, multiplied_codes
from peft_kernels.triton_common.decode_exact import EXACT_KINDS, exact_asm

HERE = Path(__file__).parent
INTERPRETED = [
    "test_triton_device.py",
    "test_triton_bottleneck_adapter.py",
    "test_triton_nf4.py",
    "test_triton_linear_4bit.py",
    "test_triton_lora_linear.py",
    "test_triton_prefix_attention.py",
    "test_triton_scaled_linear.py",
    "test_triton_prompt_embedding.py",
]


@pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="the kernels' tests run by themselves here")
@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(name):
    """Without a GPU the kernels' tests run in a process of their own: the interpreter is chosen at Triton's import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


def test_an_older_triton_is_refused(monkeypatch):
    triton_common._why_not_version.cache_clear()
    monkeypatch.setattr(triton_common, "interpreting", lambda: True)
    assert triton_common.why_not() is None
    triton_common._why_not_version.cache_clear()
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert triton_common.why_not() == "it needs triton 3.6 or later (torch 2.10 comes with it), this is 3.5.1"
    triton_common._why_not_version.cache_clear()


def test_a_compiled_kernel_is_found_again(monkeypatch):
    """By all that Triton specializes on: dtypes, alignment and numbers; arguments go in the signature's order."""
    calls = []

    class Kernel:
        arg_names = ("x_ptr", "n", "FLAG")

        def __getitem__(self, grid):
            return lambda **kwargs: calls.append(("compiles", grid)) or Compiled()

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: calls.append((grid, *args[1:]))

    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    kernel, x, cpu = Kernel(), torch.zeros(64), torch.device("cpu")
    for arguments in ((x, 3), (x[4:], 3), (x, 4), (x[1:], 3), (x.double(), 3), (None, 3)):
        for _ in range(2):
            launch.launch(kernel, (5,), cpu, n=arguments[1], FLAG=True, x_ptr=arguments[0], num_warps=4)
    launch.launch(kernel, (5, 2), cpu, n=3, FLAG=True, x_ptr=x, num_warps=8)
    new, found = ("compiles", (5,)), ((5, 1, 1), 3, True)
    again = [new, ((5, 1, 1), 4, True), *[new, found] * 3]
    assert calls == [new, found, found, found, *again, ("compiles", (5, 2))]
    calls.clear()
    launch.launch(kernel, (5,), cpu, n=3.0, FLAG=True, x_ptr=x, num_warps=4)
    assert calls == [new], "a float must not find what was compiled for an integer"
    monkeypatch.setattr(launch, "_MOST_COMPILED", 6)
    launch.launch(kernel, (5,), cpu, n=9, FLAG=True, x_ptr=x, num_warps=4)
    assert len(launch._compiled) == 1, "a shape that changes with every call must not fill the memory"


def run_ptx(asm: str, inputs: dict[str, int]) -> dict[str, int]:
    """Execute the few instructions of the decodes on input words; floats are their bits."""
    registers = {"%lanemask_lt": 0x7FFFFFFF} | inputs

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand.replace("0f", "0x"), 0)

    def as_float(bits: int) -> torch.Tensor:
        return torch.tensor(bits, dtype=torch.uint32).view(torch.float32)

    def bits16(value: torch.Tensor) -> int:
        return value.view(torch.int16).item() & 0xFFFF

    def convert(dtype: torch.dtype):
        return lambda high, low: bits16(as_float(high).to(dtype)) << 16 | bits16(as_float(low).to(dtype))

    def prmt(a: int, b: int, selector: int) -> int:
        octets = struct.pack("<II", a, b)
        assert not selector & 0x8888, "sign replication"
        return int.from_bytes(bytes(octets[(selector >> 4 * i) & 7] for i in range(4)), "little")

    operations = {
        "shr": lambda a, n: a >> n,
        "and": lambda a, b: a & b,
        "lop3": lambda a, b, c, table: {0xEA: (a & b) | c}[table],
        "xor": lambda a, b: a ^ b,
        "mov": lambda a: a,
        "prmt": lambda a, b, selector: prmt(a, b, selector & 0xFFFF),
        "mul.rn": lambda a, b: (as_float(a) * as_float(b)).view(torch.uint32).item(),
        "cvt.rn.bf16x2": convert(torch.bfloat16),
        "cvt.rn.f16x2": convert(torch.float16),
    }
    body = re.sub(r"\.reg [^;]+;", "", asm)
    for operation, operands in re.findall(r"([\w.]+)\.[buf]32 ([^;]+);", body):
        if halves := re.match(r"\{(\$\d), (\$\d)\}, (\w+)", operands):  # a word into two 16-bit registers
            registers[halves[1]], registers[halves[2]] = (registers[halves[3]] >> i & 0xFFFF for i in (0, 16))
            continue
        target, *sources = [operand.strip() for operand in operands.split(",")]
        registers[target] = operations[operation](*map(value, sources))
    return registers


@pytest.mark.parametrize("tiled", [False, True], ids=["bnb", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant_type", CODES)
def test_byte_permute_decodes_every_byte(quant_type, dtype, tiled):
    code = multiplied_codes(quant_type, dtype)
    asm = decode_asm(code, tiled=tiled)
    for first in range(0, 256, 4):
        octets = bytes(range(first, first + 4))
        registers = run_ptx(asm, {"$8": int.from_bytes(octets, "little")})
        bits = [registers[f"${i}"] for i in range(8)]
        nibbles = [nibble for b in octets for nibble in (b >> 4, b & 0xF)]
        if tiled:
            nibbles = [nibbles[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]
        integers = code.view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert bits == [integers[n].item() & (0xFFFFFFFF if dtype == torch.float32 else 0xFFFF) for n in nibbles]


@pytest.mark.parametrize("tiled", [False, True], ids=["bnb", "tiled"])
@pytest.mark.parametrize("kind", EXACT_KINDS, ids=str)
def test_exact_decode_is_bitsandbytes(kind, tiled):
    """Every byte and many scales: the product in float32, rounded once, in the order of the weight."""
    quant_type, dtype = kind
    asm, code = exact_asm(*kind, tiled), torch.tensor(CODES[quant_type])
    generator = torch.Generator().manual_seed(0)
    octets = torch.randperm(256, generator=generator).to(torch.uint8)
    # ordinary ones; a subnormal, a negative one, one that overflows float16, infinity
    scales = [*torch.rand(12, generator=generator).tolist(), 1e-40, -0.3, 7e4, float("inf")]
    for chunk, scale in zip(octets.view(16, 16), torch.tensor(scales), strict=True):
        inputs = {f"${16 + i}": int.from_bytes(bytes(chunk[4 * i : 4 * i + 4].tolist()), "little") for i in range(4)}
        registers = run_ptx(asm, inputs | {"$20": scale.view(torch.int32).item() & 0xFFFFFFFF})
        pairs = torch.tensor([registers[f"${4 * i + word}"] for word in range(4) for i in range(4)])
        weights = torch.stack([pairs & 0xFFFF, pairs >> 16], dim=1).flatten().to(torch.uint16).view(dtype)
        index = torch.stack([chunk >> 4, chunk & 0xF], dim=1).long()
        index = (index.view(-1, 2, 2).mT if tiled else index).flatten()
        torch.testing.assert_close(weights, (code[index] * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_multiplied_codes_stay_in_budget(dtype):
    """Rounding the codes, and for many rows the scales too, costs no more than the budget of a rounded weight.

    Also where inputs of one sign let the codes' errors add up, which plain rounded codes do not survive.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 64, 64, generator=generator)  # rows, blocks, elements
    absmax = w.abs().amax(-1, keepdim=True)
    code = torch.tensor(CODES["nf4"])
    index = torch.bucketize(w / absmax, (code[1:] + code[:-1]) / 2)
    exact = (code.double()[index] * absmax.double()).flatten(1)
    multiplier, codes = MULTIPLIER["nf4"][dtype], multiplied_codes("nf4", dtype)
    eager = (code[index] * absmax).to(dtype).double().flatten(1)
    few_rows = (codes.double()[index] * (absmax / multiplier).double()).flatten(1)
    many_rows = (codes[index] * (absmax / multiplier).to(dtype)).double().flatten(1)
    plain = (code.to(dtype).double()[index] * absmax.double()).flatten(1)
    normal = torch.randn(4096, generator=generator, dtype=torch.float64)
    for x in (torch.ones(4096, dtype=torch.float64), normal, normal.abs()):
        budget = ((eager - exact) @ x).square().mean().sqrt()
        assert ((few_rows - exact) @ x).square().mean().sqrt() <= budget
        assert ((many_rows - exact) @ x).square().mean().sqrt() <= 2 * budget
    assert ((plain - exact) @ normal.abs()).square().mean().sqrt() > 2 * budget


def test_fp4_codes_are_exact():
    for dtype, multiplier in MULTIPLIER["fp4"].items():
        exact = torch.tensor(CODES["fp4"], dtype=torch.float64) * multiplier
        torch.testing.assert_close(multiplied_codes("fp4", dtype).double(), exact, rtol=1e-7, atol=0)
