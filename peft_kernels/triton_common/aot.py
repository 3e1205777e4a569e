"""Ahead-of-time compilation of every kernel for every target, on a machine without a GPU.

The operations' own host code runs on tensors without storage and its launches are recorded, so that what is compiled
is what a launch on that target would compile: tiles, warps, specialized integers.
`python -m peft_kernels.triton_common.aot` prints the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dispatch import IMPLEMENTATIONS
from .launch import Launch, Target, record


@dataclasses.dataclass(frozen=True)
class Machine:
    """A target, the most shared memory that one program may use on it, and its matrix instruction in assembly."""

    target: Target
    shared_limit: int
    matrix_instruction: str

    @property
    def name(self) -> str:
        """sm_90, gfx942."""
        return f"sm_{self.target.arch}" if self.target.kind == "cuda" else str(self.target.arch)


MACHINES = (
    Machine(Target("cuda", 80, 108), 163 * 1024, r"mma\.sync"),
    Machine(Target("cuda", 89, 142), 99 * 1024, r"mma\.sync"),
    Machine(Target("cuda", 90, 132), 227 * 1024, r"wgmma\.mma_async|mma\.sync"),
    Machine(Target("cuda", 100, 148), 227 * 1024, r"tcgen05\.mma|mma\.sync"),
    Machine(Target("cuda", 120, 170), 99 * 1024, r"mma\.sync"),
    Machine(Target("hip", "gfx942", 304), 64 * 1024, r"v_mfma"),
    Machine(Target("hip", "gfx950", 256), 160 * 1024, r"v_mfma"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an operation's host code on tensors without storage; rows is its M (0 where it has none)."""

    name: str
    rows: int
    call: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one launch. spills: bytes of stack and local memory a thread; shared in bytes.

    block_m: the launch's BLOCK_M, 0 where its kernel has none.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: frozenset[str]
    binary: bytes
    block_m: int = 0


def cases() -> Iterator[tuple[str, Case]]:
    """Every operation's list of calls, which stands beside its kernels."""
    for operation in IMPLEMENTATIONS:
        module = importlib.import_module(f"peft_kernels.ops.{operation}.triton_aot")
        for case in module.cases():
            yield operation, case


def launches(case: Case, machine: Machine) -> list[Launch]:
    """The launches that the call makes on a machine."""
    with record(machine.target) as recorded, torch.device("meta"):
        case.call()
    return recorded


def compile_launch(launch: Launch, machine: Machine) -> Report:
    """Compile one recorded launch."""
    hip = machine.target.kind == "hip"
    source = ASTSource(launch.kernel, *specialize(launch))
    gpu = GPUTarget(machine.target.kind, machine.target.arch, 64 if hip else 32)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    binary = compiled.asm["hsaco" if hip else "cubin"]
    if hip:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        text, usage = compiled.asm["ptx"], _tool("cuobjdump", "--dump-resource-usage", binary)
        registers = _number(r"REG:(\d+)", usage)
        spills = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    found = frozenset(re.findall(machine.matrix_instruction, text))
    block_m = launch.args.get("BLOCK_M", 0)
    return Report(launch.kernel.fn.__name__, registers, spills, compiled.metadata.shared, found, binary, block_m)


def specialize(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constexprs, attributes) as a launch with these arguments has them."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int64: "i64",
}


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def _tool(name: str, flag: str, cubin: bytes) -> str:
    """What a tool inside Triton's wheel says about a compiled NVIDIA kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, check=True, text=True).stdout


def sass(report: Report) -> str:
    """The machine code of a kernel compiled for NVIDIA."""
    return disassembly(report.binary)


def disassembly(cubin: bytes) -> str:
    """The machine code of all kernels of an NVIDIA object."""
    return _tool("nvdisasm", "-c", cubin)


def row(case: Case, machine: Machine, report: Report) -> str:
    """One line of the table."""
    matrix = ", ".join(sorted(report.matrix_instructions)) or "-"
    return (
        f"{machine.name:8}{report.kernel:28}{case.name:36}{report.registers:5} registers {report.spills:4} B spilled"
        f" {report.shared:7} B shared  {matrix}"
    )


def main() -> None:
    """Print the table."""
    seen = set()
    for _, case in cases():
        for machine in MACHINES:
            for launch in launches(case, machine):
                line = row(case, machine, compile_launch(launch, machine))
                if line not in seen:
                    print(line, flush=True)
                seen.add(line)


if __name__ == "__main__":
    main()
