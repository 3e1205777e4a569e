"""What is made of a result: the report, the comparison, floors, the ranking for a profile, the README's tables."""

import base64
import dataclasses
import functools
import json
import re
import shutil
import subprocess

import pytest
import torch

from bench import ceilings, cli, compare, environment, html, method_table, profile, readme, timing
from bench.methods import METHODS
from bench.test_bench import FAST, QUICK, bench


def test_report_has_its_images_in_it(tmp_path):
    run_one(tmp_path)
    page = bench("report", tmp_path)
    assert page.returncode == 0, page.stderr
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'<img [^>]*src="([^"]*)"', text)
    assert len(sources) == 2 and "http" not in text  # ratios and roofline; nothing comes from elsewhere
    for source in sources:
        encoded = source.removeprefix("data:image/png;base64,")
        assert encoded != source and base64.b64decode(encoded).startswith(b"\x89PNG")


def test_report_opens_in_chromium(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    run_one(tmp_path)
    bench("report", tmp_path)
    page = tmp_path / "report.html"
    # the browser says itself, in the page's title, how many of the images it could decode
    script = (
        "<script>onload = () => document.title = [...document.images].filter(i => i.naturalWidth > 0).length</script>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path}/c",
    )
    done = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    assert "<title>2</title>" in done.stdout, done.stderr[-2000:]


@functools.cache
def one_result():
    """A quick result of one case, measured in this process."""
    case = next(case for case in QUICK if case.op == "inference")
    plan = dataclasses.replace(FAST, ceilings=ceilings.of(timing.CPU, torch.bfloat16, quick=True))
    return next(cli.run_group("linear_4bit", [case], plan, quick=True))


def run_one(folder):
    cli.write(one_result(), folder / "linear_4bit.json")


def test_compare_tells_slower_from_a_slower_machine(tmp_path):
    old = one_result()
    machine, kernel = (json.loads(json.dumps(old)) for _ in range(2))
    for result, kinds in ((machine, ("ours", "peer", "floor")), (kernel, ("ours",))):
        for row in result["cases"][0]["rows"]:
            if row["kind"] in kinds:
                row["seconds"]["p50"] *= 1.5
    verdicts = {name: [row[-1] for row in compare.changes(old, new)] for name, new in (("m", machine), ("k", kernel))}
    assert set(verdicts["m"]) == {"the same", ""}
    assert all("SLOWER" in verdict for verdict in verdicts["k"] if verdict)
    for name, result in (("old", old), ("new", kernel)):
        cli.write(result, tmp_path / f"{name}.json")
    done = bench("compare", tmp_path / "old.json", tmp_path / "new.json")
    assert done.returncode == 1 and "SLOWER" in done.stdout, done.stderr


def test_report_shows_the_method_table(tmp_path):
    """The rows that could not be measured too, with the reason."""
    result = one_result()
    setting = {"model": "tiny", "batch": 1, "sequence": 8, "dtype": "float32"}
    rows = [method_table.absent(METHODS[0], method_table.FUSED, "no <kernel>")]
    cli.write({**result, "group": "methods", "setting": setting, "rows": rows}, tmp_path / "methods.json")
    text = html.page(tmp_path)
    assert "no &lt;kernel&gt;" in text and "1 task: no measured row keeps to it" in text


def test_floor_is_the_larger_of_traffic_and_arithmetic():
    machine = {"bytes_per_second": 10.0, "flops_per_second": 100.0}
    assert ceilings.floor_seconds(machine, 1000, 50) == 10
    assert ceilings.floor_seconds(machine, 100, 500) == 50
    assert ceilings.floor_seconds(machine, 0, 0) is None


def test_profile_ranks_the_worst_first(tmp_path):
    run_one(tmp_path)
    good = {"goal": "time of a / ours", "bound": ">= 2", "measured": {"p50": 3.0}, "met": True}
    bad = {"goal": "time of ours / b", "bound": "<= 1", "measured": {"p50": 2.0}, "met": False}
    assert profile.share(good) == 1.5 and profile.share(bad) == 0.5
    result = json.loads((tmp_path / "linear_4bit.json").read_text())
    result["cases"].append({"case": "worst", "rows": [], "goals": [good, bad]})
    cli.write(result, tmp_path / "linear_4bit.json")
    assert profile.ranked(tmp_path)[0][2] == "worst"


def test_readme_tables_follow_the_json(tmp_path):
    done = bench("run", "codec", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    block = "<!-- figures: {}.json -->\n{}\n<!-- end figures -->\n"
    before = "a\n" + block.format("codec", "old") + "b\n" + block.format("absent", "kept")
    after = readme.updated(before, tmp_path)
    assert "bitsandbytes " in after.split("goals")[1] and "old" not in after and "kept" in after
    assert readme.updated(after, tmp_path) == after


def test_readme_equals_the_committed_json():
    if not readme.README.exists():
        pytest.skip("there is no README")
    text = readme.README.read_text(encoding="utf-8")
    if not any((environment.ROOT / path).exists() for path in readme.sources(text)):
        pytest.skip("the README takes no table from a JSON file that is here")
    assert readme.updated(text) == text, "run `python -m bench readme`"
