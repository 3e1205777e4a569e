"""`python -m peft_kernels`: what is usable here, with versions, for bug reports.

`python -m peft_kernels --matrix` prints the README's support matrix instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib import metadata
from types import ModuleType

import torch

import peft_kernels as pk

from . import dispatch, native

LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "adapters", "numpy")
VARIABLES = ("PEFT_KERNELS_BACKEND", "PEFT_KERNELS_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")
ABSENT = "-"


def version(distribution: str) -> str:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Versions, devices and backends, one per line."""
    rows = {"peft_kernels": pk.__version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: version(name) for name in LIBRARIES}
    core = native.load()
    rows["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads" + (f", {core.isa()}" if core else "")
    if torch.cuda.is_available():
        rows["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        rows["CUDA C++"] = native.why_not_cuda(torch.device("cuda", 0), ()) or "usable"
    rows |= {f"backend {name}": why or "usable" for name, why in pk.backends().items()}
    rows |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def operation(public: object) -> str:
    """The operation that a public function or module belongs to: the folder in peft_kernels/ops, or the codec."""
    path = getattr(public, "__module__", "").split(".")
    return path[2] if path[1] == "ops" else "nf4"


def has(op: str, backend: str) -> str:
    """Whether this version carries an implementation."""
    module = dispatch.IMPLEMENTATIONS.get(op, {}).get(backend)
    return "yes" if module is not None and importlib.util.find_spec(module) is not None else ABSENT


def support_matrix() -> str:
    """Markdown: each public function with its module and the backends that this version implements it on."""
    lines = [
        "| `pk.functional` | `pk.nn` | native (CPU) | Triton (GPU) | reference (anywhere) |",
        "|---|---|:-:|:-:|:-:|",
    ]
    for name, function in public(pk.functional):
        op = operation(function)
        modules = [f"`{cls}`" for cls, value in public(pk.nn) if operation(value) == op]
        own = [cls for cls in modules if cls.strip("`").lower() == name.replace("_", "")]
        modules = own or modules  # where several functions share a slice, each has a module of its name
        oracle = "yes" if hasattr(pk.reference, name) else ABSENT
        lines.append(
            f"| `{name}` | {' '.join(modules) or ABSENT} | {has(op, 'native')} | {has(op, 'triton')} | {oracle} |"
        )
    return "\n".join(lines)


def public(namespace: ModuleType) -> list[tuple[str, object]]:
    """The public names of a namespace and what they stand for."""
    return [(name, getattr(namespace, name)) for name in sorted(namespace.__all__)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels", description="Backends and versions, for bug reports."
    )
    parser.add_argument("--matrix", action="store_true", help="print the README's support matrix instead")
    print(support_matrix() if parser.parse_args().matrix else report())
