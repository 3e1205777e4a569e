"""Without a GPU, every kernel compiles for every target: no spills, within shared memory, on the matrix units.

No figure may be worse than the committed table's, bench/results/aot.json.
"""

import functools
import re

import pytest

from bench import aot as gate

pytest.importorskip("triton")
from peft_kernels.triton_common import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
from peft_kernels.triton_common import aot

# Kernels whose work is a matrix product; those that only move or decode data have none.
MATRIX_KERNELS = {
    "_bottleneck_fwd_kernel",
    "_bottleneck_bwd_kernel",
    "_bottleneck_columns_kernel",
    "_linear_4bit_fwd_kernel",
    "_linear_4bit_bwd_kernel",
    "_lora_decode_kernel",
    "_lora_expand_planes_kernel",
    "_lora_shrink_kernel",
    "_lora_dy_kernel",
    "_lora_da_kernel",
    "_lora_expand_kernel",
    "_prompt_attention_fwd_kernel",
    "_prompt_attention_bwd_kernel",
    "_prompt_attention_dq_kernel",
    "_prompt_attention_dkv_kernel",
}
# Where a 64-row tile of the first operand exists, Hopper and Blackwell must use their own instructions.
NATIVE = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
CASES = {f"{operation}-{case.name}": case for operation, case in aot.cases()}
MACHINES = {machine.name: machine for machine in aot.MACHINES}


COMMITTED = gate.committed()


@functools.cache
def _compiled(kernel, arguments, options, machine):
    return aot.compile_launch(_launches[kernel, arguments, options, machine], MACHINES[machine])


_launches = {}


def compiled(launch, target):
    key = (launch.kernel.fn.__name__, repr(aot.specialize(launch)), repr(launch.options), target.name)
    _launches[key] = launch
    return _compiled(*key)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name, machine):
    case, target = CASES[name], MACHINES[machine]
    rows = list(gate.triton_rows(name.partition("-")[0], case, target, compiled))
    assert rows
    for row, report in rows:
        print(aot.row(case, target, report))
        assert report.spills == 0
        assert report.shared <= target.shared_limit
        if report.kernel in MATRIX_KERNELS:
            assert report.matrix_instructions, "no matrix instruction: the compiler dropped the product"
            # on Hopper 32 rows are faster (measured), on Blackwell 64 rows of more than 128 inner units spill
            narrow = report.kernel == "_bottleneck_bwd_kernel" and report.block_m < 64
            if case.rows >= 64 and machine in NATIVE and not narrow:
                assert NATIVE[machine] in report.matrix_instructions
        hold(row)


def hold(row):
    """No row may be worse than the committed one; other compilers are not compared."""
    if COMMITTED["versions"]["triton"] == gate.versions()["triton"]:
        worse = gate.worse(row, COMMITTED["rows"].get((row["target"], row["launch"])))
        assert not worse, f"{row['launch']} on {row['target']}: {worse}; if it must be, `python -m bench aot`"


def hopper(name, layout="bnb"):
    """(launch, report) of a forward call of `linear_4bit` on Hopper."""
    case = CASES[f"linear_4bit-forward {name}" + (" tiled" if layout == "tiled" else "")]
    launch = aot.launches(case, MACHINES["sm_90"])[0]
    return launch, compiled(launch, MACHINES["sm_90"])


@pytest.mark.parametrize("layout", ["bnb", "tiled"])
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 256])
def test_few_instructions_a_weight_on_hopper(rows, layout):
    """The gate of the few-rows loop; wgmma takes the weight from registers, and the next does not wait for the last."""
    launch, report = hopper(f"M={rows} bf16 nested", layout)
    code = aot.sass(report)
    per_weight = gate.sass_per_weight(code, launch.args, launch.options["num_warps"])
    assert per_weight <= (6 if rows <= 64 else 7)  # at 256 rows the faster tile (measured) has the longer loop
    if rows <= 8:  # mma.sync has the narrowest product, and takes both operands from registers
        assert "HMMA" in code and "STS.128" not in code
        return
    products = re.findall(r"HGMMA\S* R\d+, (\w+)", code)
    assert products and all(operand.startswith("R") for operand in products), "the weight goes through shared memory"
    loop = max((body for body in gate.assembly(code)[1] if any("HGMMA" in name for name in body)), key=len)
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name in loop)
    if rows > 64:  # another program of the multiprocessor multiplies meanwhile
        return
    assert 2 * waits <= sum("HGMMA" in name for name in loop), "each product waits for the one before"


@pytest.mark.parametrize("layout", ["bnb", "tiled"])
@pytest.mark.parametrize("rows", [1, 16])
def test_decode_moves_every_byte_once(rows, layout):
    """In each turn of the loop: the weight's bytes and its scales' once, x's once; the weight's by 16 bytes.

    What a program stores is its tile of the sums, in float32 and once.
    """
    launch, report = hopper(f"M={rows} bf16 nested", layout)
    loaded = gate.loaded_bytes(aot.sass(report), launch.options["num_warps"])
    stored = gate.stored_bytes(aot.sass(report), launch.options["num_warps"])
    block_m, block_n, block_k = (launch.args[f"BLOCK_{side}"] for side in "MNK")
    weight, x, scales = block_n * block_k // 2, 2 * block_m * block_k, block_n * block_k // 64
    wide_x = x if rows == 16 and layout == "tiled" else 0  # in another layout x's rows come in pieces
    assert stored == 4 * block_m * block_n if rows == 16 else 0 < stored <= 4 * block_m * block_n  # masked at M = 1
    assert loaded[16] == weight + wide_x
    assert loaded[1] == scales
    # beside x: each row's second-level scale, and the table entry of each block's code, which stays in the L1 cache
    assert loaded[4] + loaded[8] == x - wide_x + 4 * block_n + 4 * scales


@pytest.mark.parametrize("machine", [name for name, machine in MACHINES.items() if machine.target.kind == "cuda"])
@pytest.mark.parametrize(
    "name", [f"nf4-dequantize bf16 {what}" for what in ("nested", "columns", "tiled", "rows apart")]
)
def test_decode_moves_16_bytes_at_a_time(name, machine):
    """The codes and the weights once each, in accesses as wide as there are."""
    (launch,) = aot.launches(CASES[name], MACHINES[machine])
    sass = aot.sass(compiled(launch, MACHINES[machine]))
    threads, elements = 32 * launch.options["num_warps"], launch.args["BLOCKS"] * launch.args["BLOCKSIZE"]
    assert len(re.findall(r"LDG\.E\.128", sass)) * 16 * threads == elements // 2
    assert len(re.findall(r"STG\.E\.128", sass)) * 16 * threads == elements * 2
    assert not re.search(r"STG\.E(\.64)? ", sass)


@pytest.mark.parametrize("source", gate.cuda_sources(), ids=lambda path: path.name)
@pytest.mark.parametrize("target", gate.CUDA_TARGETS)
def test_cuda_file(source, target):
    if reason := gate.cuda_why_not():
        pytest.skip(reason)
    for row in gate.cuda_rows(source, target):
        assert row["spills"] == 0
        if COMMITTED["versions"]["nvcc"] == gate.versions()["nvcc"]:
            worse = gate.worse(row, COMMITTED["rows"].get((target, row["launch"])))
            assert not worse, f"{row['launch']} on {target}: {worse}; if it must be, `python -m bench aot`"


# Groups of 8 rows of x -> instructions for each weight in a window: of all kinds, and of those that the half-as-wide
# integer units execute.
CUDA_LIMITS = {1: (3.5, 1.7), 2: (3.8, 1.6)}


@pytest.mark.parametrize("target", gate.CUDA_TARGETS)
@pytest.mark.parametrize("groups", CUDA_LIMITS)
def test_few_instructions_a_weight_in_cuda(target, groups):
    """The gate of the decode kernel, on the committed table, which `test_cuda_file` holds the compiler to."""
    for dtype in ("__nv_bfloat16", "__half"):
        for nested in ("true", "false"):
            row = COMMITTED["rows"][target, f"linear_4bit.cu linear_4bit_kernel<{dtype}, {groups}, {nested}>"]
            figures = row["sass_per_weight"], row["integer_per_weight"]
            assert all(figure <= limit for figure, limit in zip(figures, CUDA_LIMITS[groups], strict=True))
            assert row["matrix"] == ["HMMA"] and row["wide_loads"] == 2
            assert row["registers"] <= 128, "a block of 512 threads must fit onto a multiprocessor"


def test_a_worse_row_is_caught():
    before = {"registers": 64, "spills": 0, "shared": 1024, "matrix": ["mma.sync"], "sass_per_weight": 7.5}
    assert gate.worse(before, before) == []
    before |= {"integer_per_weight": 3.0, "shared_per_weight": 1.0, "wide_loads": 8}
    changes = [{"registers": 65}, {"spills": 4}, {"shared": 2048}, {"sass_per_weight": 7.6}, {"matrix": []}]
    for change in (*changes, {"integer_per_weight": 3.1}, {"shared_per_weight": 1.1}, {"wide_loads": 4}):
        assert len(gate.worse(before | change, before)) == 1
    assert gate.worse(before, None) == ["it is not in the table"]


def test_main_loop_is_counted():
    loop = [".L_x_1:", *["/*0010*/ PRMT R1, R2, R3, R4 ;"] * 62, "/*0400*/ HMMA.16816.F32.BF16 R4, R8, R2, R4 ;"]
    loop.append("/*0410*/ @P0 BRA `(.L_x_1) ;")
    other = [".L_x_2:", *["/*0500*/ LDG.E R1, [R2] ;"] * 99, "/*0600*/ BRA `(.L_x_2) ;"]
    tile = {"packed_ptr": None, "BLOCK_N": 128, "BLOCK_K": 64}
    assert gate.sass_per_weight("\n".join(loop + other), tile, 4) == 64 / 64
    assert gate.sass_per_weight("\n".join(other), tile, 4) is None


def test_cuda_window_is_counted():
    window = ["/*0000*/ DEPBAR.LE SB0, 0x3 ;", "/*0010*/ LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64], P0 ;"]
    window += ["/*0020*/ LDGSTS.E [R4], desc[UR4][R2.64], P0 ;", *["/*0030*/ LOP3.LUT R1, R2, R3, R4 ;"] * 60]
    window += ["/*0390*/ LDS.128 R4, [R2] ;", "/*0394*/ LDS R4, [R2] ;"]
    window += ["/*0400*/ HMMA.16816.F32.BF16 R4, R8, R2, R4 ;"]
    expected = {"matrix": ["HMMA"], "sass_per_weight": 2.062, "integer_per_weight": 1.875}
    expected |= {"shared_per_weight": 0.156, "wide_loads": 1}
    assert gate.decoding("\n".join(window * 3)) == expected
    assert gate.decoding("/*0010*/ LDG.E R1, [R2] ;")["sass_per_weight"] is None


def test_cuda_rows(tmp_path):
    if reason := gate.cuda_why_not():
        pytest.skip(reason)
    source = tmp_path / "two.cu"
    source.write_text("""
        __global__ void scale(float* x) { __shared__ float s[32]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads();
                                          x[threadIdx.x] = 2 * s[31 - threadIdx.x]; }
        __global__ void add(float* x) { x[threadIdx.x] += 1; }""")
    shared = [(row["shared"], row["spills"], 0 < row["registers"] < 40) for row in gate.cuda_rows(source, "sm_90a")]
    assert sorted(shared) == [(0, 0, True), (128, 0, True)]


def test_list_is_complete():
    """No kernel is missing from the list."""
    named = {launch.kernel.fn.__name__ for case in CASES.values() for launch in aot.launches(case, aot.MACHINES[1])}
    assert named >= MATRIX_KERNELS | {"_nf4_quantize_kernel", "_nf4_dequantize_kernel", "_sum_planes_kernel"} | {
        "_column_pass_kernel",
        "_prompt_embedding_fwd_kernel",
        "_prompt_embedding_dprompt_kernel",
        "_prompt_embedding_dweight_kernel",
    }
