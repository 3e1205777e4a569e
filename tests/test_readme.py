"""The README tells the truth: its Python runs, its commands exist and are run, its support matrix is the code's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels.__main__ import support_matrix

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Each command that the README shows: where it is run, and by which text there.
RUN_BY = {
    "make demo": ("tests/test_demo.py", "bench.demo"),
    "make test": (".ci/run", "make test"),
    "make lint": (".ci/run", "make lint"),
    "make sanitize": (".ci/run", "make sanitize"),
    "make bench": ("bench/test_bench.py", '"-m", "bench"'),
    "python -m bench list": ("bench/test_bench.py", 'bench("list"'),
    "python -m bench run lora_linear --shapes llama-3.1-8b --peers peft": ("bench/test_bench.py", '"--peers"'),
    "python -m bench compare old.json new.json": ("bench/test_reporting.py", 'bench("compare"'),
    "python -m bench report DIR": ("bench/test_reporting.py", 'bench("report"'),
    "python -m bench methods --model smollm2-135m --tasks 100": ("bench/test_methods.py", 'bench("methods"'),
    "python -m bench tune linear_4bit": ("bench/test_methods.py", 'bench("tune"'),
    "python -m bench aot": ("tests/test_aot.py", "gate.triton_rows"),
    "make gpu-check": ("tests/test_readme.py", '"gpu-check"'),
    "make test-adapters": ("Makefile", "$(MAKE) test-adapters"),
    "bench/gpu_check.sh OUT 9": ("bench/test_gpu_check.py", '"gpu_check.sh"'),
    "python -m bench readme": ("bench/test_reporting.py", "readme.updated"),
    "make clean": ("tests/test_readme.py", "def test_make_clean"),
    "pip install .": (".ci/run", "pip install --quiet --no-deps ."),
    "python -m peft_kernels": ("tests/test_imports.py", '"-m", "peft_kernels"'),
}


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    """Every command in a shell block or in backquotes."""
    shown = {line for block in blocks("sh") for line in block.splitlines() if line}
    return shown | set(re.findall(r"`((?:make|python|pip) [^`]+)`", README))


def test_python_blocks_run_in_order():
    pytest.importorskip("peft")
    result = subprocess.run([sys.executable, "-c", "\n".join(blocks("python"))], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "14 layers replaced, 0 left alone" in result.stdout  # the report, of 2 blocks with 7 linear layers
    assert "lora_linear: " in result.stdout  # what explain said


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_is_run_somewhere(command):
    file, text = RUN_BY[command]
    assert text in (ROOT / file).read_text(encoding="utf-8")


def test_make_targets_run_what_is_tested():
    for target, recipe in {
        "demo": "-m bench.demo",
        "bench": "-m bench run",
        "test": "-m pytest",
        "gpu-check": "bench/gpu_check.sh",
    }.items():
        assert recipe in dry_run(target)


def test_make_clean_removes_only_what_was_built():
    removed = dry_run("clean").removeprefix("rm -rf ").split()
    tracked = subprocess.run(["git", "ls-files", *removed], cwd=ROOT, capture_output=True, text=True)
    assert tracked.returncode or not tracked.stdout  # git fails outside a checkout


def dry_run(target: str) -> str:
    """What make would run."""
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_support_matrix_is_the_code_s():
    matrix = re.search(r"<!-- matrix:begin -->\n(.*?)<!-- matrix:end -->", README, re.DOTALL)
    remedy = "put the output of `python -m peft_kernels --matrix` between the README's matrix markers"
    assert matrix[1].strip() == support_matrix(), remedy


def test_links_and_paths_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
