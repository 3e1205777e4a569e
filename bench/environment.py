"""What a reader needs to judge or repeat the figures: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import peft_kernels as pk
from peft_kernels import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "unsloth", "liger_kernel", "adapters", "numpy")
FLAGS = ("avx2", "avx512f", "avx512bw", "avx512vbmi", "avx512_bf16", "avx512_vnni", "amx_bf16")


def cpu() -> tuple[str, list[str]]:
    """(model name, the instruction-set flags that matter here)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"model name\s*:\s*(.+)", text)
    found = re.search(r"flags\s*:\s*(.+)", text)
    flags = found.group(1).split() if found else []
    return (model.group(1) if model else platform.machine()), [flag for flag in FLAGS if flag in flags]


def gpu(device: torch.device) -> dict[str, Any]:
    """The accelerator; empty on a CPU."""
    if device.type == "cpu":
        return {}
    properties = torch.get_device_module(device).get_device_properties(device)
    facts = {"gpu": properties.name, "memory_bytes": properties.total_memory}
    capability = f"{properties.major}.{properties.minor}" if hasattr(properties, "major") else None
    l2 = getattr(properties, "L2_cache_size", None)
    return facts | {"capability": capability, "multiprocessors": properties.multi_processor_count, "l2_bytes": l2}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine."""
    model, flags = cpu()
    core = native.load()
    return gpu(device) | {
        "cpu": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": core.isa() if core else native.why_not(),
        "platform": platform.platform(),
    }


def name(machine: dict[str, Any]) -> str:
    """The machine in a few words, from its record."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['native']}"


def slug(device: torch.device) -> str:
    """The machine as a folder name."""
    text = gpu(device).get("gpu") or f"{cpu()[0]} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def record(device: torch.device) -> dict[str, Any]:
    """All of it; `load` is the machine's one-minute load before the run."""
    versions = {"peft_kernels": pk.__version__, "python": platform.python_version()}
    return {
        "device": machine(device),
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD"),  # where the tree is no checkout of it
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
