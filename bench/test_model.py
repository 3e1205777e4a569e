"""The cost model: its units, that more work takes longer, and the published facts that it must reproduce."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from bench import aot, model, model_bars, model_training

N, K = 14336, 4096
H100 = model.DEVICES[0]


@pytest.mark.parametrize("device", model.DEVICES, ids=lambda device: device.name)
def test_rates_agree(device):
    """The clock belongs to the tensor rate: FLOP per clock and multiprocessor is a power of two."""
    per_clock = device.flops / device.multiprocessors / device.hertz
    assert math.log2(per_clock) == pytest.approx(round(math.log2(per_clock)), abs=0.02)


def test_units():
    """A gigabyte at a terabyte per second is a millisecond, and so on."""
    unit = model.Device("unit", "unit", "sm_90", 1, 1e9, 1e12 / model.COPY, 1e12 / model.GEMM, 0, lanes=1000)
    weights = 10**9
    assert model.decode(unit, 1, weights, in_cache=True).memory == pytest.approx(model.NESTED_BYTES * 1e-3)
    assert model.decode(unit, 1, weights).memory == pytest.approx((model.NESTED_BYTES + 2) * 1e-3)
    assert model.gemm(unit, 5, 1, weights).tensor == pytest.approx(1e-2)
    assert model.fused(unit, 1, 1, weights, 7.0, block_m=1).issue * model.ISSUE == pytest.approx(7e-3)


@pytest.mark.parametrize("device", model.DEVICES, ids=lambda device: device.name)
def test_more_work_takes_longer(device):
    times = [model.fused(device, m, N, K, 6.0, block_m=64).seconds for m in (1, 64, 65, 512, 4096)]
    assert times == sorted(times) and times[0] < times[-1]
    assert model.fused(device, 64, N, K, 9.0, block_m=64).issue > model.fused(device, 64, N, K, 6.0, block_m=64).issue
    plain, lora = (model.fused(device, 1, N, K, 6.0, block_m=16, rank=r).seconds for r in (0, 16))
    assert plain < lora
    dense = [model.decode_and_gemm(device, m, N, K) for m in (1, 512, 2048, 8192)]
    assert dense == sorted(dense)


@pytest.mark.parametrize("m, share", [(2048, 0.14), (8192, 0.036)])
def test_decode_beside_gemm_on_h100(m, share):
    """What is known of decode to scratch + cuBLAS."""
    ratio = model.decode(H100, N, K).memory / model.gemm(H100, m, N, K).tensor
    assert ratio == pytest.approx(share, rel=0.05)


def test_cross_over_on_h100():
    """Decode in registers wins for few rows, decode to scratch from about 512 on."""
    for m, wins in ((16, True), (128, True), (256, True), (1024, False), (8192, False)):
        assert (model.fused(H100, m, N, K, 6.8, block_m=128).seconds < model.decode_and_gemm(H100, m, N, K)) == wins


def test_few_rows_wait_for_the_slowest_unit(tmp_path):
    """Integer units are half as wide as the issue, shared memory a quarter."""
    cheap = {"sass_per_weight": 1.0, "integer_per_weight": 0.5, "shared_per_weight": 0.25}
    issue = model.few_rows(H100, 1, N, K, cheap).issue
    assert issue * H100.issue * model.ISSUE == pytest.approx(N * K)
    for unit in cheap:
        assert model.few_rows(H100, 1, N, K, cheap | {unit: 2 * cheap[unit]}).issue == pytest.approx(2 * issue)
    assert model.few_rows(H100, 1, N, K, cheap).seconds == model.few_rows(H100, 1, N, K, cheap).memory
    assert model.few_rows(H100, 16, N, K, cheap).tensor == 2 * model.few_rows(H100, 8, N, K, cheap).tensor
    launch = "linear_4bit.cu linear_4bit_kernel<__nv_bfloat16, 2, true>"
    (tmp_path / "aot.json").write_text(json.dumps({"rows": [{"target": "sm_90a", "launch": launch}]}))
    assert model.cuda_row(H100, 16, tmp_path / "aot.json")
    assert model.cuda_row(H100, 8, tmp_path / "aot.json") is None
    assert model.cuda_row(H100, 17, tmp_path / "aot.json") is None


@pytest.mark.parametrize("m", [1, 4, 16])
def test_decode_bar_on_h100_is_predicted(m):
    """70 % of copy bandwidth, by the committed ahead-of-time table."""
    floor = model.NESTED_BYTES * N * K / (H100.bandwidth * model.COPY)
    assert floor / model.few_rows(H100, m, N, K, model.cuda_row(H100, m)).seconds >= 0.7


def test_panels_of_l2_size():
    """A panel in L2 costs what the whole weight does if it fills as many waves of tiles, more if it does not."""
    whole = model.decode_and_gemm(H100, 8192, N, K)
    assert model_training.panels(H100, 8192, N, K, N) == pytest.approx(whole, rel=0.01)
    assert model_training.panels(H100, 8192, N, K, 3072) == pytest.approx(whole, rel=0.015)
    assert model_training.panels(H100, 8192, N, K, 256) > 1.05 * whole
    assert model_training.panels(H100, 8192, N, K, 1792) > model_training.panels(H100, 8192, N, K, 2048)


def test_lora_in_a_gemm():
    """Each way's cost is the traffic that it names; a mask rules out the longer product."""
    ways = model_training.lora_ways(H100, 8192, N, K, 16)
    one_pass = model.HALF * 8192 * N / (H100.bandwidth * model.COPY)
    assert ways["pass over the result"] == pytest.approx(2 * one_pass, rel=0.02)
    assert one_pass < ways["vendor GEMM adds to it"] < ways["pass over the result"]
    assert ways["K longer by r"] < ways["vendor GEMM adds to it"]  # a wide result
    deep = model_training.lora_ways(H100, 8192, K, N, 16)
    assert min(deep, key=deep.get) == "vendor GEMM adds to it"
    assert model_training.lora_ways(H100, 8192, N, K, 16, masked=True)["K longer by r"] == math.inf


@pytest.mark.parametrize("device", model.DEVICES, ids=lambda device: device.name)
def test_training_step(device):
    """Above its floor, below its peers; the adapters' share falls with depth."""
    floor, ours = (f(device, 8192, N, K) for f in (model_training.dense_step, lambda *s: model_training.step(*s, 16)))
    peers = model_training.unsloth_order(device, 8192, N, K), model_training.peft_bnb(device, 8192, N, K)
    assert floor < ours < peers[0] < peers[1]
    mine, theirs = model_training.peak_bytes(8192, N, K, 16)
    assert mine < theirs


def test_bars(tmp_path):
    """Every goal has a prediction or no figure to make one of; a measured goal is found beside it."""
    bars = list(model_bars.bars(H100, {}))
    assert {bar.work for bar in bars if math.isnan(bar.predicted)} == {
        bar.work for bar in bars if bar.work.startswith(("decode", "NF4"))
    }
    first = bars[0]
    assert first.met == (first.predicted <= 1.15)
    case = {"shape": {"M": 8192, "N": N, "K": K}, "goals": [{"goal": first.goal, "measured": {"p50": 1.25}}]}
    (tmp_path / "gpu").mkdir()
    record = {"device": {"gpu": "NVIDIA H100 80GB HBM3"}, "cases": [case]}
    (tmp_path / "gpu" / "lora_linear.json").write_text(json.dumps(record))
    assert model_bars.measured(H100, first, tmp_path) == 1.25
    assert model_bars.measured(H100, bars[1], tmp_path) is None


def test_instructions_of_bitsandbytes(tmp_path):
    """Counted in its wheel; a warp's matrix product makes 2048 multiply-adds, which gives the number of warps."""
    bnb, triton = pytest.importorskip("bitsandbytes"), pytest.importorskip("triton")
    library = Path(bnb.__file__).with_name("libbitsandbytes_cuda130.so")
    if bnb.__version__ != "0.50.2" or not library.exists():
        pytest.skip("another version of bitsandbytes")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    subprocess.run([tools / "cuobjdump", "--extract-elf", "sm_90", library], cwd=tmp_path, check=True)
    (cubin,) = tmp_path.glob("*sm_90.cubin")
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    functions = dict(part.split(":", 1) for part in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:])
    for rows, tile in {32: (32, 64, 128), 64: (64, 64, 64)}.items():
        sides = "".join(f"Li{side}E" for side in tile)
        name = f"_Z23gemm_4bit_sm80_m16n8k16I13__nv_bfloat16{sides}E"
        (function,) = (text for found, text in functions.items() if found.startswith(name))
        loops = [loop for loop in aot.assembly(function)[1] if any(op.startswith("HMMA") for op in loop)]
        (loop,) = loops
        products = sum(op.startswith("HMMA") for op in loop)
        warps = math.prod(tile) / 2048 / products
        assert model.BNB_SASS[rows] == pytest.approx(len(loop) * warps * 32 / (tile[1] * tile[2]), abs=0.1)


def test_tables(tmp_path, capsys):
    table = tmp_path / "aot.json"
    launch = "linear_4bit forward M=1 bf16 nested _linear_4bit_fwd_kernel"
    row = {"target": "sm_90", "launch": launch, "sass_per_weight": 5.1}
    table.write_text(json.dumps({"rows": [row, {**row, "target": "gfx942", "sass_per_weight": None}]}))
    sass = model.sass_table(table)
    assert sass == {("sm_90", launch): 5.1}
    assert model.sass_table(tmp_path / "none") == {}
    by_rows = {m: seconds for m, seconds, _ in model.rows(H100, N, K, sass)}
    assert by_rows[1] == pytest.approx(by_rows[4], rel=0.01) and math.isnan(by_rows[64])
    record = {"device": {"gpu": "NVIDIA H100 80GB HBM3"}, "cases": [{"shape": {"M": 1, "N": N, "K": K}, "rows": []}]}
    record["cases"][0]["rows"].append({"contender": "ours", "seconds": {"p50": 1e-5}})
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "linear_4bit.json").write_text(json.dumps(record))
    assert model.measured(H100, 1, N, K, tmp_path) == 1e-5
    assert all(model.measured(other, 1, N, K, tmp_path) is None for other in model.DEVICES[1:])
    model.main()
    assert "H100 SXM" in capsys.readouterr().out
