"""What the tests of the Triton kernels share: where they run, and poisoned memory."""

import pytest
import torch

pytest.importorskip("triton")
from peft_kernels.triton_common import interpreting

if not (interpreting() or torch.cuda.is_available()):
    reason = "needs a GPU or TRITON_INTERPRET=1 (test_triton_common.py runs these tests in the interpreter)"
    pytest.skip(reason, allow_module_level=True)

DEVICE = torch.device("cpu" if interpreting() else "cuda")
# The interpreter truncates float32 to bfloat16 where hardware rounds, so bfloat16 is for GPUs.
HALVES = [torch.float16] if interpreting() else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    """The same inputs every run."""
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Fresh normal values on the device."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)
