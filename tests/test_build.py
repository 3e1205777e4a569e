"""What setup.py does in each PEFT_KERNELS_BUILD mode, and how the native core sits in the process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels import native

ROOT = Path(__file__).resolve().parent.parent
# An editable install's finder would look for the native core in the checkout.
REPORT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
from peft_kernels import native
assert native.load() is None
print(native.why_not())
"""

if not (ROOT / "setup.py").exists():
    pytest.skip("needs a source checkout", allow_module_level=True)


def run(*command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, without anything built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "peft_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


def build(checkout, **env):
    return run(sys.executable, "setup.py", "-q", "build", "--build-lib", "lib", cwd=checkout, **env)


def import_report(checkout):
    result = run(sys.executable, "-c", REPORT, cwd=checkout / "lib", PYTHONPATH=str(checkout / "lib"))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_none_gives_a_pure_python_package(checkout):
    result = build(checkout, PEFT_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "PEFT_KERNELS_BUILD=cpu" in import_report(checkout)


def test_auto_survives_a_broken_compiler_with_one_warning(checkout):
    result = build(checkout, PEFT_KERNELS_BUILD="auto", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the native core was not built") == 1
    assert "could not be imported" in import_report(checkout)


def test_cpu_with_a_broken_compiler_is_an_error(checkout):
    assert build(checkout, PEFT_KERNELS_BUILD="cpu", CC="false", CXX="false").returncode != 0


def test_other_modes_are_refused(checkout):
    result = build(checkout, PEFT_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "expected one of" in result.stderr


def test_cuda_without_nvcc_is_an_error(checkout):
    result = build(checkout, PEFT_KERNELS_BUILD="cuda", PATH="")
    assert result.returncode != 0
    assert "no nvcc on PATH" in result.stderr and "PEFT_KERNELS_BUILD=cpu" in result.stderr


LOAD_CUDA = """
import importlib.util, sys, torch
from peft_kernels import native
native.load()
spec = importlib.util.spec_from_file_location("peft_kernels._native_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(torch.cuda.is_available(), [module.device_unsupported(0)], len(module.decode_table(0, 2)))
"""


def test_cuda_module_is_built_and_imported_without_a_gpu(tmp_path):
    """In the checkout, whose objects of the core are there already."""
    if not shutil.which("nvcc") or native.load() is None:
        pytest.skip("there is no nvcc" if native.load() else native.why_not())
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path))
    result = run(*command, cwd=ROOT, PEFT_KERNELS_BUILD="cuda", PEFT_KERNELS_CUDA_ARCHS="80")
    assert result.returncode == 0, result.stderr
    (module,) = tmp_path.glob("peft_kernels/_native_cuda*")
    result = run(sys.executable, "-c", LOAD_CUDA, str(module), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("17") and (result.stdout.startswith("True") or "['']" not in result.stdout)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime_in_the_process():
    core = native.load()
    if core is None:
        pytest.skip(native.why_not())
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(libraries) == 1
