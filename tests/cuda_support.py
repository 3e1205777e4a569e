"""Where the CUDA kernels' tests run: on a GPU, and anywhere in the emulation (tests/cuda_emulation)."""

import ctypes
import importlib.util
import mmap
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peft_kernels import native

EMULATION = Path(__file__).parent / "cuda_emulation"
CSRC = EMULATION.parent.parent / "csrc"
SHARED_MEMORY = 227 << 10


class Emulated:
    """The emulated device; `shape` chooses what shared memory it has, its multiprocessors, and its threads' order."""

    device = torch.device("cpu")

    def __init__(self, library):
        self._library = library

    def shape(self, shared_memory=SHARED_MEMORY, multiprocessors=2, seed=0):
        self._library.emulate(shared_memory, multiprocessors, seed)


class Card:
    """The GPU, which has what it has."""

    device = torch.device("cuda", 0)

    def shape(self, **kwargs):
        pass


def beside_a_fault(tensor, end):
    """The same values at the end (or the beginning) of accessible memory."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = (pages + 1) * mmap.PAGESIZE - size if end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def build(folder):
    """csrc/cuda as plain C++, with the emulation's headers before CUDA's; the module's path."""
    import pybind11

    includes = [EMULATION, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [
        "g++",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-extern-tls-init",
        "-Wall",
    ]
    command += ["-Wextra", "-Wno-attributes", "-Wno-unknown-pragmas", "-Werror", *(f"-I{path}" for path in includes)]
    sources = [*CSRC.glob("cuda/*.cu"), CSRC / "cuda" / "bindings.cpp", EMULATION / "runtime.cpp"]

    def compiled(source):
        target = folder / f"{source.name}.o"
        kind = ["-O1", "-x", "c++"] if source.suffix == ".cu" else ["-O0" if source.stem == "bindings" else "-O1"]
        subprocess.run([*command, *kind, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    module = folder / "_native_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", module], check=True)
    return module


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """(the emulated module, its library)."""
    if native.load() is None:
        pytest.skip(native.why_not())
    path = build(tmp_path_factory.mktemp("cuda_emulation"))
    spec = importlib.util.spec_from_file_location("peft_kernels._native_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """The emulation, and the GPU where there is one."""
    if request.param == "card":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        if reason := native.why_not_cuda(Card.device, ()):
            pytest.skip(reason)
        return Card()
    module, library = request.getfixturevalue("emulation")
    monkeypatch.setattr(native, "_load_cuda", lambda: (module, None))
    monkeypatch.setattr(native, "cuda_place", lambda device: (0, 0))
    emulated = Emulated(library)
    emulated.shape()
    return emulated
