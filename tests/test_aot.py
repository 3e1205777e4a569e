"""Without a GPU, every kernel compiles for every target: no spills, within shared memory, on the matrix units."""

import functools

import pytest

pytest.importorskip("triton")
from peft_kernels.triton_common import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
from peft_kernels.triton_common import aot

# Kernels whose work is a matrix product; those that only move or decode data have none.
MATRIX_KERNELS = {
    "_linear_4bit_fwd_kernel",
    "_linear_4bit_bwd_kernel",
    "_lora_linear_gemm_kernel",
    "_lora_shrink_kernel",
    "_lora_dy_kernel",
    "_lora_da_kernel",
    "_lora_expand_add_kernel",
    "_prompt_attention_fwd_kernel",
    "_prompt_attention_dq_kernel",
    "_prompt_attention_dkv_kernel",
}
# Where a 64-row tile of the first operand exists, Hopper and Blackwell must use their own instructions.
NATIVE = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
CASES = {f"{operation}-{case.name}": case for operation, case in aot.cases()}
MACHINES = {machine.name: machine for machine in aot.MACHINES}


@functools.cache
def compiled(kernel, arguments, options, machine):
    return aot.compile_launch(_launches[kernel, arguments, options, machine], MACHINES[machine])


_launches = {}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name, machine):
    case, target = CASES[name], MACHINES[machine]
    launches = aot.launches(case, target)
    assert launches
    for launch in launches:
        key = (launch.kernel.fn.__name__, repr(aot.specialize(launch)), repr(launch.options), machine)
        _launches[key] = launch
        report = compiled(*key)
        print(aot.row(case, target, report))
        assert report.spills == 0
        assert report.shared <= target.shared_limit
        if report.kernel in MATRIX_KERNELS:
            assert report.matrix_instructions, "no matrix instruction: the compiler dropped the product"
            if case.rows >= 64 and machine in NATIVE:
                assert NATIVE[machine] in report.matrix_instructions


def test_list_is_complete():
    """No kernel is missing from the list."""
    named = {launch.kernel.fn.__name__ for case in CASES.values() for launch in aot.launches(case, aot.MACHINES[1])}
    assert named >= MATRIX_KERNELS | {"_nf4_quantize_kernel", "_nf4_dequantize_kernel", "_sum_planes_kernel"} | {
        "_column_pass_kernel",
        "_prompt_embedding_fwd_kernel",
        "_prompt_embedding_dprompt_kernel",
        "_prompt_embedding_dweight_kernel",
    }
