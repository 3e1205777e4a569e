"""`import peft_kernels` stands alone: quickly, without optional libraries, without a compiled core."""

import inspect
import re
import subprocess
import sys

import pytest

import peft_kernels as pk

OPTIONAL = ("triton", "bitsandbytes", "transformers", "peft", "adapters", "accelerate", "matplotlib", "rich")
ROOT_NAMES = {
    "BackendError",
    "PreparationReport",
    "ReplacementReport",
    "Weight4bit",
    "backends",
    "explain",
    "functional",
    "nn",
    "prepare_bitfit",
    "prepare_scale_bias",
    "reference",
    "replace_layers",
    "restore_layers",
    "use_backend",
}
FUNCTIONS = {"dequantize_4bit", "linear_4bit", "lora_linear", "quantize_4bit"}
FUNCTIONS |= {"bitfit_linear", "bottleneck_adapter", "ia3_linear", "scale_bias_linear"}
FUNCTIONS |= {"gated_prompt_attention", "prefix_attention", "prompt_embedding"}
MODULES = {"BitFitLinear", "BottleneckAdapter", "IA3Linear", "Linear4bit", "LoRALinear", "ScaleBiasLinear"}
MODULES |= {"GatedPromptAttention", "PrefixAttention", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"}

SMALL_RUN = """
import torch
x = torch.randn(3, 64, requires_grad=True)
weight = pk.functional.quantize_4bit(torch.randn(32, 64))
for _ in range(2):
    y = pk.functional.lora_linear(x, weight, torch.randn(4, 64), torch.randn(32, 4))
    pk.functional.linear_4bit(x, weight).sum().backward()
assert y.shape == (3, 32) and x.grad.shape == x.shape
"""


def run(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, which must succeed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def block(*modules: str) -> str:
    """Code that makes importing these modules fail."""
    return f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"


def test_import_loads_nothing_optional():
    code = "import sys, torch\nbefore = set(sys.modules)\nimport peft_kernels\nafter = set(sys.modules) - before\n"
    code += "print(*sorted({name.split('.')[0] for name in after}))"
    loaded = run(code).stdout.split()
    assert not set(loaded) & {*OPTIONAL, "numpy"}
    assert "peft_kernels" in loaded


@pytest.mark.alone
def test_import_is_fast_beside_torch():
    code = "import time, torch\nstart = time.perf_counter()\nimport peft_kernels\nprint(time.perf_counter() - start)"
    assert min(float(run(code).stdout) for _ in range(3)) < 0.3


def test_works_without_optional_libraries():
    run(block(*OPTIONAL) + "import peft_kernels as pk\n" + SMALL_RUN + "assert pk.backends()['triton']")


def test_works_without_the_native_core_and_says_so_once():
    result = run(block("peft_kernels._native") + "import peft_kernels as pk\n" + SMALL_RUN)
    warnings = re.findall(r"(\w+) runs on the reference path \(slow\): native: (.*)", result.stderr)
    operations = [operation for operation, _ in warnings]
    assert sorted(operations) == sorted(set(operations)), "one line for each operation and reason"
    assert {"linear_4bit", "lora_linear"} <= set(operations)
    assert all("could not be imported" in why and "PEFT_KERNELS_BUILD=cpu" in why for _, why in warnings)


def test_a_backend_asked_for_by_name_is_an_error_where_it_is_missing():
    code = block("peft_kernels._native") + "import peft_kernels as pk\nwith pk.use_backend('native'):\n try:\n"
    code += "  import torch; pk.functional.quantize_4bit(torch.randn(2, 64))\n"
    code += " except pk.BackendError as error: print(error)"
    assert "native" in run(code).stdout


def test_public_names():
    assert set(pk.__all__) >= ROOT_NAMES
    assert set(pk.functional.__all__) >= FUNCTIONS
    assert set(pk.nn.__all__) >= MODULES


@pytest.mark.parametrize("namespace", [pk, pk.functional, pk.reference, pk.nn], ids=lambda m: m.__name__)
def test_all_is_sorted_and_exists(namespace):
    assert namespace.__all__ == sorted(namespace.__all__)
    assert not [name for name in namespace.__all__ if not hasattr(namespace, name)]


def test_reference_has_every_function():
    assert sorted(pk.reference.__all__) == sorted(pk.functional.__all__)


@pytest.mark.parametrize("name", sorted(pk.functional.__all__))
def test_signatures_agree(name):
    assert inspect.signature(getattr(pk.functional, name)) == inspect.signature(getattr(pk.reference, name))


@pytest.mark.parametrize("name", sorted({*pk.functional.__all__, *pk.nn.__all__}))
def test_has_a_docstring(name):
    assert inspect.getdoc(getattr(pk.functional, name, None) or getattr(pk.nn, name))


def test_report_for_bug_reports():
    result = subprocess.run([sys.executable, "-m", "peft_kernels"], capture_output=True, text=True, check=True)
    for word in (
        "peft_kernels",
        pk.__version__,
        "torch",
        "triton",
        "bitsandbytes",
        "backend native",
        "backend reference",
    ):
        assert word in result.stdout
