"""The method table and the cross-over rows: what they print follows from what was measured."""

import json
import time
from dataclasses import replace

import psutil
import pytest
import torch

from bench import method_pick, method_table, methods, timing, tune
from bench.case import FUNCTIONAL, Options, Training
from bench.cases import linear_4bit
from bench.method_pick import Limits
from bench.methods import METHODS, TINY, trained
from bench.peers import dense
from bench.test_bench import bench

FAST = timing.Effort(seconds=0.02, sample=1e-5, min_rounds=3, max_rounds=3)
SETTING = method_table.Setting(TINY, timing.CPU, torch.float32, FAST, batch=1, sequence=8)


MEASURED = ("LoRA", "QLoRA", "Bottleneck adapters", "BitFit", "Prompt tuning", "LLaMA-Adapter V2")


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("peft")
    wanted = tuple(method for method in METHODS if method.name in MEASURED)
    return {(row["method"], row["way"]): row for row in method_table.rows(SETTING, wanted)}


def test_rows_are_measured(rows):
    lora, fused = rows["LoRA", "unfused"], rows["LoRA", "fused"]
    assert lora["trainable"] == fused["trainable"] > 0
    assert lora["adapter_bytes"] == fused["adapter_bytes"] > 4 * lora["trainable"]
    assert fused["step_seconds"]["p50"] > 0 and fused["layers"]["replaced"] == 14  # 2 blocks of 7 linear layers


def test_every_measured_method_is_fused(rows):
    reasons = {
        key: row["why_not"] for key, row in rows.items() if "why_not" in row and "not installed" not in row["why_not"]
    }
    assert not reasons
    adapters = rows["Bottleneck adapters", "fused"]
    assert adapters["layers"]["replaced"] == 4 and adapters["trainable"] == 4 * (2 * 64 * 4 + 64 + 4)


def test_what_is_left_after_merging(rows):
    merged = rows["LoRA", "unfused"]["merge"]
    assert merged["merges"] and merged["parameters"] == 0 and merged["error"] < 1e-5
    assert rows["BitFit", "unfused"]["merge"]["parameters"] == rows["BitFit", "unfused"]["trainable"]  # its biases
    for name in ("Bottleneck adapters", "Prompt tuning", "LLaMA-Adapter V2"):
        assert not rows[name, "fused"]["merge"]["merges"]


def test_merging_into_4_bits_loses_accuracy(rows):
    if "why_not" in rows["QLoRA", "unfused"]:
        pytest.skip(rows["QLoRA", "unfused"]["why_not"])
    for way in ("unfused", "fused"):
        merged = rows["QLoRA", way]["merge"]
        assert merged["rounding"] < 1e-4 < 1e-3 < merged["error"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_that_do_not_merge(method):
    """Those are the ones that PEFT has no merge for either."""
    if reason := method.why_not():
        pytest.skip(reason)
    model = trained(method, method_table.fresh(method, SETTING))
    if method.merge is None:
        assert not hasattr(model, "merge_and_unload")
    else:
        assert hasattr(model, "merge_and_unload") == hasattr(model, "peft_config")


def test_error_is_that_of_most_tokens():
    truth = torch.randn(1, 9, 32, dtype=torch.float64)
    actual = truth * 1.01
    actual[0, 4] += 100
    assert method_table.error(actual, truth) == pytest.approx(0.01)


def test_a_failing_method_is_a_row():
    def refuse(model):
        raise RuntimeError("this version cannot")

    broken = method_table.Method("Broken", "", refuse)
    (row,) = method_table.rows(SETTING, (broken,))
    assert row["why_not"] == "RuntimeError: this version cannot"


def test_a_wrong_kernel_gives_no_row(monkeypatch):
    pytest.importorskip("peft")
    right = methods.pk.replace_layers

    def wrong(model):
        report = right(model)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.01)
        return report

    monkeypatch.setattr(methods.pk, "replace_layers", wrong)
    found = {row["way"]: row for row in method_table.rows(SETTING, (METHODS[0],))}
    assert "check failed" in found["fused"]["why_not"] and "why_not" not in found["unfused"]


def test_one_wrong_kind_of_gradient_gives_no_row():
    pytest.importorskip("peft")

    def wrong(model):
        for name, parameter in model.named_parameters():
            if "0.self_attn.q_proj.lora_B" in name:
                parameter.register_hook(lambda gradient: gradient * (1 + 1e-5))
        return {}, None

    found = {row["way"]: row for row in method_table.rows(SETTING, (replace(METHODS[0], fuse=wrong),))}
    assert "q_proj.lora_B" in found["fused"]["why_not"] and "why_not" not in found["unfused"]


def row(trainable, memory, overhead, merged=None, adapter=100, step=1.0):
    merge = {"merges": merged is not None} | ({} if merged is None else {"overhead": merged})
    sizes = {"trainable": trainable, "model_bytes": memory - 20, "step_peak_bytes": 10, "optimizer_bytes": 10}
    sizes |= {"adapter_bytes": adapter}
    return {**sizes, "overhead": {"p50": overhead}, "merge": merge, "step_seconds": {"p50": step}}


def test_pick_keeps_to_the_limits():
    big, small, slow = row(1000, 800, 0.5, merged=0.0), row(10, 100, 0.1), row(1000, 800, 0.5, merged=0.0, step=2.0)
    rows = [slow, big, small, row(1900, 9000, 9.0, step=3.0), {"why_not": "absent"}]
    assert method_pick.pick(rows, Limits()) is big
    assert method_pick.pick(rows, Limits(memory=500)) is small
    assert method_pick.pick(rows, Limits(overhead=0.05)) is big  # one task is merged
    assert method_pick.pick(rows, Limits(overhead=0.2, tasks=2)) is small  # two cannot be
    assert method_pick.pick(rows, Limits(memory=150, tasks=2)) is None  # a second adapter takes its bytes
    assert method_pick.pick(rows, Limits(overhead=0.01, tasks=2)) is None


def test_methods_command(tmp_path):
    pytest.importorskip("peft")
    tiny = ("--model", TINY, "--dtype", "float32", "--batch", 1, "--sequence", 8, "--only", "IA³", "--quick")
    done = bench("methods", *tiny, "--tasks", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "For 3 tasks: IA³" in done.stdout
    result = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    text = method_pick.markdown(result)
    assert "| IA³ |" in text and "- 1 task: IA³" in text


@pytest.mark.parametrize(
    "op, other",
    [("linear_4bit", "linear_4bit.native_vendor.linear"), ("prefix_attention", "prefix_attention.library.forward")],
)
def test_tune_forces_each_way(op, other, monkeypatch):
    if reason := tune.why_not(op, timing.CPU):
        pytest.skip(reason)
    case = list(tune.cases(op, Options(quick=True)))[-1]
    work = case.build()
    for name in work.contenders:
        work.check(name)
    ours, vendor = tune.OPS[op].ways
    if ours not in work.contenders:
        pytest.skip("this machine has no fused kernel")

    monkeypatch.setattr(f"peft_kernels.ops.{other}", lambda *arguments: 1 / 0)  # what only one of the ways calls
    work.contenders[ours].calls[0]()
    with pytest.raises(ZeroDivisionError):
        work.contenders[vendor].calls[0]()


def test_tune_command(tmp_path):
    if reason := tune.why_not("linear_4bit", timing.CPU):
        pytest.skip(reason)
    done = bench("tune", "linear_4bit", "--quick", "--seconds", 0.05, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"forward 192x576": ' in done.stdout and (tmp_path / "tune_linear_4bit.json").exists()


def test_tune_names_rows():
    def record(m, forward, backward):
        rows = [
            {"contender": way, "phases": {"forward": {"p50": forward[i]}, "backward": {"p50": backward[i]}}}
            for i, way in enumerate((tune.FUSED, tune.DECODE))
        ]
        return {"shape": {"M": m, "N": 8, "K": 4}, "rows": rows}

    records = [record(1, (1, 4), (3, 2)), record(16, (2, 3), (3, 2)), record(64, (5, 4), (3, 2))]
    forward, backward = tune.named_rows("linear_4bit", records)
    assert forward == '"forward 8x4": 16,  # 4.00 x at M=1, 1.50 x at M=16'
    assert backward.startswith('"backward 8x4": 0,')


def test_training_is_made_in_its_context():
    entered = []

    class Around:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *error):
            pass

    x = torch.ones(2, requires_grad=True)
    Training(lambda: 2 * x, {"dx": x}, torch.ones(2), Around)()
    assert len(entered) == 2


def others_cores(before):
    """Cores that other processes kept busy since `before`, a (time, busy seconds of the machine, own seconds)."""
    elapsed, busy, own = (now - then for now, then in zip(processor_times(), before, strict=True))
    return (busy - own) / elapsed


def processor_times():
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    return time.perf_counter(), sum(machine) - idle, time.process_time()


@pytest.mark.alone
def test_two_runs_agree_on_the_ratio():
    """Within 10 % on a machine of one's own: interleaved samples, ratios within a round, the median of many rounds."""
    options = Options(shapes=("llama-3.2-1b",))
    case = next(case for case in linear_4bit.cases(options) if case.name.endswith("2048x2048, M=16"))
    work = case.build(lambda peer: False)
    calls = {name: work.contenders[name].calls for name in (FUNCTIONAL, dense.NAME)}
    effort = timing.Effort(seconds=2.0, min_rounds=31, max_rounds=400)
    before = processor_times()
    first, second = (timing.measure(calls, effort) for _ in range(2))
    if (cores := others_cores(before)) > 0.2:
        pytest.skip(f"other processes kept {cores:.1f} cores busy meanwhile")
    one, other = (timing.quantiles(times[dense.NAME])["p50"] for times in (first, second))
    if max(one, other) > 1.2 * min(one, other):  # a neighbour on the same core, whom no counter here shows
        pytest.skip(f"the machine changed its speed meanwhile: torch took {one * 1e3:.2f} ms, then {other * 1e3:.2f}")
    ratios = [timing.ratio(times[dense.NAME], times[FUNCTIONAL])["p50"] for times in (first, second)]
    assert max(ratios) / min(ratios) < 1.1, ratios
