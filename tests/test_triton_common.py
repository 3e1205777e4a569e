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
from peft_kernels.ops.nf4.reference import CODES
from peft_kernels.triton_common import interpreting
from peft_kernels.triton_common.decode import decode_asm

HERE = Path(__file__).parent
INTERPRETED = [
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


def run_ptx(asm: str, word: int) -> dict[str, int]:
    """Execute the few instructions of the decode on one input word."""
    registers = {"$4": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def prmt(a: int, b: int, selector: int) -> int:
        octets = struct.pack("<II", a, b)
        assert not selector & 0x8888, "sign replication"
        return int.from_bytes(bytes(octets[(selector >> 4 * i) & 7] for i in range(4)), "little")

    operations = {
        "shr": lambda a, n: a >> n,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "mov": lambda a: a,
        "prmt": lambda a, b, selector: prmt(a, b, selector & 0xFFFF),
    }
    for operation, operands in re.findall(r"(shr|and|or|mov|prmt)\.b32 ([^;]+);", asm):
        target, *sources = [operand.strip() for operand in operands.split(",")]
        registers[target] = operations[operation](*map(value, sources))
    return registers


@pytest.mark.parametrize("quant_type", CODES)
def test_byte_permute_decodes_every_byte(quant_type):
    code = CODES[quant_type]
    asm = decode_asm(code)
    for first in range(0, 256, 4):
        octets = bytes(range(first, first + 4))
        registers = run_ptx(asm, int.from_bytes(octets, "little"))
        words = struct.pack("<4I", *(registers[f"${i}"] for i in range(4)))
        expected = [code[b >> 4] for b in octets] + [code[b & 0xF] for b in octets]
        assert words == struct.pack("<8e", *expected)


def test_float16_codes_stay_in_budget():
    """The decode's float16 codes cost little, also where an input of one sign lets their rounding add up."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 16, (256, 64, 64), generator=generator)  # rows, blocks, elements
    scale = torch.rand(256, 64, 1, generator=generator) * 0.1
    code = torch.tensor(CODES["nf4"])
    exact = (code.double()[index] * scale.double()).flatten(1)
    eager = (code[index] * scale).bfloat16().double().flatten(1)
    fused = (code.half().float()[index] * scale).bfloat16().double().flatten(1)
    for x in (torch.ones(4096, dtype=torch.float64), torch.randn(4096, generator=generator, dtype=torch.float64)):
        assert ((fused - exact) @ x).square().mean() <= 4 * ((eager - exact) @ x).square().mean()
