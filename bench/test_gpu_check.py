"""The GPU visit, rehearsed on the CPU: every step is taken, and none that fails stops the others."""

import os
import re
import subprocess
import sys
import tarfile

import pytest

from bench.environment import ROOT

STEPS = ("environment", "ceilings", "build", "tests", "bench-codec", "tune", "methods", "profile", "report")


def visit(out, **environment):
    command = [ROOT / "bench" / "gpu_check.sh", out, "3"]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=out.parent, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    statuses = dict(re.findall(r"^(\S+) +status +(\d+) after", summary, re.MULTILINE))
    with tarfile.open(out / "visit.tar.gz") as packed:
        return summary, {name: int(status) for name, status in statuses.items()}, packed.getnames()


def test_dry_run_takes_every_step(tmp_path):
    pytest.importorskip("triton")
    summary, statuses, files = visit(tmp_path / "out", DRY_RUN="1", PYTHON=sys.executable, CASES="codec/dequantize*")
    assert statuses == dict.fromkeys(STEPS, 0), summary
    assert {
        "./ceilings.json",
        "./results/codec.json",
        "./results/methods.json",
        "./results/report.html",
        "./profile.log",
    } <= set(files)
    assert len(list((tmp_path / "out").iterdir())) == 2  # a device machine hands few files back


def test_failing_steps_stop_nothing(tmp_path):
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "no luck" >&2\nexit 3\n')
    broken.chmod(0o755)
    summary, statuses, files = visit(tmp_path / "out", DRY_RUN="1", PYTHON=str(broken), CASES="codec linear_4bit")
    assert set(statuses) == {*STEPS, "bench-linear_4bit"} and set(statuses.values()) == {3}
    assert "no luck" in summary and "./report.log" in files


def test_a_spent_visit_ends_in_time(tmp_path):
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec sleep 100\n')
    slow.chmod(0o755)
    command = [ROOT / "bench" / "gpu_check.sh", tmp_path / "out", "0"]
    subprocess.run(command, env=os.environ | {"DRY_RUN": "1", "PYTHON": str(slow)}, check=True, timeout=20)
    assert "report: no time left" in (tmp_path / "out" / "summary.txt").read_text()
