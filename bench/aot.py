"""The table of what the compilers make of every GPU kernel, without a GPU; no row may get worse unnoticed.

A Triton row is one launch of a call that an operation compiles ahead of time (`ops/<op>/triton_aot.py`) on one target:
registers a thread, bytes spilled, shared memory, matrix instructions, and the machine instructions that a 4-bit weight
costs in the main loop. A CUDA row is one kernel of `csrc/cuda/*.cu`; of those that decode it also has how many of these
instructions are for the integer units, which are half as wide, the words that it reads from shared memory, and how many
16-byte copies of weights it starts in a window of columns. `python -m bench aot` writes both to `results/aot.json`, and
the tests hold what is compiled to it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .environment import RESULTS, ROOT

PATH = RESULTS / "aot.json"
CUDA = ROOT / "csrc" / "cuda"
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100")
NOT_MORE = ("registers", "spills", "shared", "sass_per_weight", "integer_per_weight", "shared_per_weight")
WARP = 32
_MATRIX = re.compile(r"[HQU]\w*MMA|WARPGROUP\.\w*MMA")
# What the integer units execute on these targets, by NVIDIA's table of arithmetic throughput: 64 lanes a clock.
_INTEGER = re.compile(r"(PRMT|SHF|LOP3|ISETP|IADD3|SEL|LEA|VIADD|VIMNMX|VIADDMNMX|IMNMX)\b")
# Weights come by the only copies to shared memory that pass the L1 cache by.
_WEIGHT_LOAD = re.compile(r"LDGSTS\.E\.BYPASS\S*\.(\d+)")
_SHARED_LOAD = re.compile(r"LDS(?:\.U)?(?:\.(\d+))?$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(?P<name>[A-Z]\S*)(?P<rest>.*);")

Row = dict[str, Any]


def assembly(sass: str) -> tuple[list[str], list[list[str]]]:
    """(the instruction names of a kernel, those of each innermost loop's body)."""
    labels: dict[str, int] = {}
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            target = re.search(r"\.L_x_\d+", instruction["rest"])
            if instruction["name"].startswith("BRA") and target and target[0] in labels:
                spans.append((labels[target[0]], len(names)))
            names.append(instruction["name"])
    innermost = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return names, [names[start : end + 1] for start, end in innermost]


def sass_per_weight(sass: str, arguments: dict[str, Any], warps: int) -> float | None:
    """Instructions that a thread executes for each 4-bit weight that it decodes; None for a kernel that decodes none.

    A kernel of matrix products decodes a BLOCK_N x BLOCK_K tile in each turn of its main loop, the longest loop that
    multiplies. The codec handles BLOCKS x BLOCKSIZE weights without a loop: the whole kernel counts.
    """
    names, bodies = assembly(sass)
    if {"packed_ptr", "BLOCK_N", "BLOCK_K"} <= arguments.keys():
        lengths = [len(body) for body in bodies if any(_MATRIX.match(name) for name in body)]
        count, weights = max(lengths, default=0), arguments["BLOCK_N"] * arguments["BLOCK_K"]
    elif {"packed_ptr", "BLOCKS", "BLOCKSIZE"} <= arguments.keys():
        count, weights = names.index("EXIT") + 1 if "EXIT" in names else 0, arguments["BLOCKS"] * arguments["BLOCKSIZE"]
    else:
        return None
    return round(count * warps * WARP / weights, 3) if count else None


_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def loaded_bytes(sass: str, warps: int) -> Counter[int]:
    """What a program loads from global memory in each turn of its main loop: bytes by the width of the loads."""
    _, bodies = assembly(sass)
    loop = max((body for body in bodies if any(_MATRIX.match(name) for name in body)), key=len)
    return _traffic(loop, ("LDG", "LDGSTS"), warps)


def stored_bytes(sass: str, warps: int) -> int:
    """What a program stores to global memory, each store being made once and no lane masked."""
    return _traffic(assembly(sass)[0], ("STG", "RED", "ATOM", "ATOMG"), warps).total()


def _traffic(names: list[str], kinds: tuple[str, ...], warps: int) -> Counter[int]:
    """Bytes by the width of the accesses."""
    moved: Counter[int] = Counter()
    for name in names:
        kind, *suffixes = name.split(".")
        if kind in kinds:
            width = next((_BYTES[suffix] for suffix in suffixes if suffix in _BYTES), 4)
            moved[width] += width * warps * WARP
    return moved


def triton_rows(operation: str, case: Any, machine: Any, compiled: Any = None) -> Iterator[tuple[Row, Any]]:
    """(row, report) of each launch of a case on a machine; compiled(launch, machine) may come from a cache."""
    from peft_kernels.triton_common import aot

    seen: Counter[str] = Counter()
    launches = {}  # one of each that compile alike
    for launch in aot.launches(case, machine):
        launches.setdefault((launch.kernel, repr(aot.specialize(launch)), repr(launch.options)), launch)
    for launch in launches.values():
        report = (compiled or aot.compile_launch)(launch, machine)
        key = f"{operation} {case.name} {report.kernel}"
        seen[key] += 1
        nvidia = machine.target.kind == "cuda"
        sass = aot.sass(report) if nvidia and "packed_ptr" in launch.args else ""
        row = {
            "target": machine.name,
            "launch": key if seen[key] == 1 else f"{key} {seen[key]}",
            "registers": report.registers,
            "spills": report.spills,
            "shared": report.shared,
            "matrix": sorted(report.matrix_instructions),
            "sass_per_weight": sass_per_weight(sass, launch.args, launch.options.get("num_warps", 4)) if sass else None,
        }
        yield row, report


def cuda_sources() -> list[Path]:
    """The CUDA files of this version."""
    return sorted(CUDA.glob("*.cu"))


def cuda_why_not() -> str | None:
    """Why CUDA files cannot be compiled here."""
    return None if shutil.which("nvcc") else "there is no nvcc"


def cuda_rows(source: Path, target: str) -> list[Row]:
    """What nvcc makes of each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", f"-arch={target}", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "--resource-usage"]
        cubin = Path(folder) / "out.cubin"
        done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc {target} {source.name}: {done.stderr[-2000:]}")
        assemblies = cuda_assemblies(cubin.read_bytes())
    rows = []
    for part in re.split(r"Compiling entry function ", done.stdout + done.stderr)[1:]:
        name = part.partition("'")[2].partition("'")[0]

        def number(pattern: str, text: str = part) -> int:
            return sum(map(int, re.findall(pattern, text)))

        rows.append(
            {
                "target": target,
                "launch": f"{source.name} {readable(name)}",
                "registers": number(r"Used (\d+) registers"),
                "spills": number(r"(\d+) bytes (?:stack frame|spill stores|spill loads)"),
                "shared": number(r"(\d+) bytes smem"),
                **decoding(assemblies[name]),
            }
        )
    return rows


def readable(name: str) -> str:
    """A kernel's name and template arguments from its symbol."""
    full = subprocess.run(["c++filt", name], capture_output=True, check=True, text=True).stdout
    return full.partition("(")[0].removeprefix("void ").replace("peft_kernels::", "").strip()


def cuda_assemblies(cubin: bytes) -> dict[str, str]:
    """Symbol -> machine code of a compiled file's kernels."""
    from peft_kernels.triton_common import aot

    parts = re.split(r"^\.text\.(\S+):", aot.disassembly(cubin), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def decoding(sass: str) -> Row:
    """What a window of columns costs a lane for each of its 4-bit weights, from one wait for copies to the next.

    Such a window is multiplied, and another one's copies are started.
    """
    names, _ = assembly(sass)
    waits = [i for i, name in enumerate(names) if name.startswith("DEPBAR")]
    loop = names[waits[0] : waits[1]] if len(waits) > 1 else []
    loads = [int(found[1]) for found in map(_WEIGHT_LOAD.match, loop) if found]
    weights = sum(loads) / 4
    words = sum(int(found[1] or 32) / 32 for found in map(_SHARED_LOAD.match, loop) if found)
    integer = sum(_INTEGER.match(name) is not None for name in loop)
    return {
        "matrix": sorted({name.partition(".")[0] for name in names if _MATRIX.match(name)}),
        "sass_per_weight": round(len(loop) / weights, 3) if weights else None,
        "integer_per_weight": round(integer / weights, 3) if weights else None,
        "shared_per_weight": round(words / weights, 3) if weights else None,
        "wide_loads": loads.count(128),
    }


def all_rows() -> Iterator[Row]:
    """Every row, compiled now."""
    from peft_kernels.triton_common import aot

    for operation, case in aot.cases():
        for machine in aot.MACHINES:
            for row, _ in triton_rows(operation, case, machine):
                yield row
    if cuda_why_not() is None:
        for source in cuda_sources():
            for target in CUDA_TARGETS:
                yield from cuda_rows(source, target)


def versions() -> dict[str, str | None]:
    """The compilers whose figures these are."""
    import triton

    nvcc = None
    if cuda_sources() and cuda_why_not() is None:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        nvcc = text.partition("release ")[2].partition(",")[0]
    return {"triton": triton.__version__, "nvcc": nvcc}


def committed() -> dict[str, Any]:
    """The committed table: versions, and rows by (target, launch); empty where there is none."""
    if not PATH.exists():
        return {"versions": {}, "rows": {}}
    table = json.loads(PATH.read_text(encoding="utf-8"))
    return {"versions": table["versions"], "rows": {(row["target"], row["launch"]): row for row in table["rows"]}}


def worse(row: Row, before: Row | None) -> list[str]:
    """What got worse than the committed row. No tolerance: the same compiler gives the same figures."""
    if before is None:
        return ["it is not in the table"]
    pairs = [(what, before.get(what), row.get(what)) for what in NOT_MORE]
    grown = [f"{what}: {old} -> {new}" for what, old, new in pairs if new is not None and old is not None and new > old]
    if row.get("wide_loads", 0) < before.get("wide_loads", 0):
        grown.append(f"16-byte loads: {before['wide_loads']} -> {row['wide_loads']}")
    lost = set(before["matrix"]) - set(row["matrix"])
    return grown + [f"no {instruction} any more" for instruction in sorted(lost)]


def write(rows: list[Row]) -> None:
    """The table, one row a line, so that a change is a line of the diff."""
    lines = ",\n".join("  " + json.dumps(row) for row in sorted(rows, key=lambda r: (r["launch"], r["target"])))
    PATH.write_text(f'{{\n "versions": {json.dumps(versions())},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
