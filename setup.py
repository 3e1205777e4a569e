"""Builds the optional native core `peft_kernels._native` from csrc/, and `peft_kernels._native_cuda` from csrc/cuda/.

PEFT_KERNELS_BUILD selects what is built: auto (default: the core, and where there is nvcc its CUDA kernels; a failure
is a warning and leaves that part out), none, cpu (the core; a failure is an error), cuda (both; likewise).
PEFT_KERNELS_CUDA_ARCHS: the architectures to build for, "80,90a,100" unless set. CXXFLAGS and LDFLAGS are honoured.
PEFT_KERNELS_EMULATE=avx512bf16: for tests on machines without these instructions, other AVX-512 in their place.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# GCC 12's own AVX-512 header reads its deliberately undefined registers, hundreds of warnings a file (GCC bug 105593).
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# A file's suffix selects the instructions it may use; csrc/cpu/isa.cpp decides at run time which files are entered.
ISA_FLAGS = {"_avx512bf16": [*AVX512, "-mavx512vbmi", "-mavx512bf16"], "_avx512": AVX512, "_avx2": AVX2}
EMULATE = ["-DPEFT_KERNELS_EMULATE"] if os.environ.get("PEFT_KERNELS_EMULATE") == "avx512bf16" else []
if EMULATE:
    ISA_FLAGS["_avx512bf16"] = [*AVX512, "-include", str(ROOT / "tests/cpu_emulation/avx512bf16.h")]

# -ffp-contract=off: a product and a sum must round separately where bitsandbytes rounds them separately;
# kernels ask for fused multiply-add by name.
# -Wno-psabi: GCC notes that 64-byte vectors are passed differently with AVX-512; no such call survives inlining.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The runtime library is linked in, its symbols hidden: torch has one of its own in the process. It looks for a driver
# when first called, so the module can be imported without one.
NVCC_LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]


def build_mode() -> str:
    mode = os.environ.get("PEFT_KERNELS_BUILD", "auto").lower()
    if mode not in MODES:
        raise SystemExit(f"PEFT_KERNELS_BUILD={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "cuda" and not shutil.which("nvcc"):
        raise SystemExit("PEFT_KERNELS_BUILD=cuda: there is no nvcc on PATH; install it, or use PEFT_KERNELS_BUILD=cpu")
    return mode


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def isa_suffix(source: str) -> str | None:
    return next((suffix for suffix in ISA_FLAGS if Path(source).stem.endswith(suffix)), None)


def native_sources() -> list[str]:
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("**/*.cpp"))
    return [s for s in found if not s.startswith("csrc/cuda/") and (is_x86() or isa_suffix(s) is None)]


def cuda_sources() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cuda").glob("*.c*") if p.suffix != ".cuh")


def cuda_targets() -> list[str]:
    archs = os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "80,90a,100").split(",")
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def is_fresh(target: Path, command: str) -> bool:
    """True when `target` was made by the same command from inputs (its depfile lists them) that are all older."""
    depfile, record = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (target.exists() and depfile.exists() and record.exists() and record.read_text() == command):
        return False
    inputs = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(os.path.exists(i) and os.path.getmtime(i) <= made for i in inputs)


WARNING = """
WARNING: the native core was not built.
WARNING: peft_kernels will be installed as pure Python and CPU operations will be slower.
WARNING: install a C++17 compiler, then reinstall with PEFT_KERNELS_BUILD=cpu to see why."""
CUDA_WARNING = """
WARNING: the CUDA kernels were not built; nothing else depends on them.
WARNING: reinstall with PEFT_KERNELS_BUILD=cuda to see why."""
CUDA_MODULE = "peft_kernels._native_cuda"


class BuildNative(build_ext):
    """One object per source with its own instruction-set flags, in parallel, skipping those that are up to date."""

    core_failed = False

    def build_extension(self, ext: Extension) -> None:
        if self.core_failed:  # what depends on it need not be tried
            return
        try:
            self._build_native(ext)
        except Exception as error:
            self.core_failed = ext.name != CUDA_MODULE
            if ext.optional:
                print(CUDA_WARNING if ext.name == CUDA_MODULE else WARNING, f"({error})\n", file=sys.stderr)
                if not getattr(error, "__module__", "").startswith(("distutils", "setuptools")):
                    from setuptools.errors import CompileError

                    raise CompileError(str(error)) from error
            raise

    def _build_native(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [str(ROOT / "csrc"), pybind11.get_include(), *self.include_dirs]
        with ThreadPoolExecutor(self.parallel or min(2, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda source: self._compile(source, includes), ext.sources))
        linked_after = output.stat().st_mtime if output.exists() else 0.0
        if not (self.force or any(os.path.getmtime(o) > linked_after for o in objects)):
            return
        if ext.name == CUDA_MODULE:
            subprocess.run(["nvcc", *NVCC_LINK, *objects, "-o", str(output)], check=True)
        else:
            # Linked without -fopenmp: the OpenMP symbols resolve to the runtime that torch has loaded, because two
            # thread pools in one process fight for the cores.
            undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            self.compiler.link_shared_object(objects, str(output), target_lang="c++", extra_postargs=undefined)

    def _compile(self, source: str, includes: list[str]) -> str:
        if source.endswith(".cu"):
            return self._compile_cuda(source)
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        flags = [*CXX_FLAGS, *EMULATE, *openmp, *ISA_FLAGS.get(isa_suffix(source) or "", [])]
        command = " ".join([*getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so), *flags, *includes])
        if self.force or not is_fresh(target, command):
            target.parent.mkdir(parents=True, exist_ok=True)
            dependencies = ["-MMD", "-MF", str(target.with_suffix(".d"))]
            self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=includes, extra_postargs=[*flags, *dependencies]
            )
            target.with_suffix(".cmd").write_text(command)
        return str(target)

    def _compile_cuda(self, source: str) -> str:
        target = Path(self.build_temp) / f"{source}.o"
        command = ["nvcc", "-c", source, "-o", str(target), *NVCC_FLAGS, *cuda_targets(), f"-I{ROOT / 'csrc'}"]
        if self.force or not is_fresh(target, " ".join(command)):
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-MD", "-MF", str(target.with_suffix(".d"))], check=True)
            target.with_suffix(".cmd").write_text(" ".join(command))
        return str(target)


def extensions() -> list[Extension]:
    mode = build_mode()
    if mode == "none":
        return []
    built = [Extension("peft_kernels._native", native_sources(), language="c++", optional=mode == "auto")]
    if mode == "cuda" or (mode == "auto" and shutil.which("nvcc")):
        built.append(Extension(CUDA_MODULE, cuda_sources(), language="c++", optional=mode == "auto"))
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
