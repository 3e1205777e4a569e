"""What the tests of the Triton kernels share: where they run, and poisoned memory."""

import numpy as np
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


class Traffic:
    """Every address that interpreted kernels load from and store to within `with Traffic() as moved`."""

    def __enter__(self):
        from triton.runtime.interpreter import InterpreterBuilder

        self.builder = InterpreterBuilder
        self.load, self.store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        self.addresses = {"loaded": [], "stored": []}
        # all other accesses of the interpreter but atomics, which no kernel has, end in these two
        InterpreterBuilder.create_masked_load = self.recorded("loaded", self.load, 2)
        InterpreterBuilder.create_masked_store = self.recorded("stored", self.store, 3)
        return self

    def recorded(self, kind, access, at):
        """The access, its lanes noted; the mask is its argument `at`."""

        def recording(*args):
            pointers, mask = args[1].data, args[at].data
            self.addresses[kind].append(pointers[np.broadcast_to(mask, pointers.shape)])
            return access(*args)

        return recording

    def __exit__(self, *_):
        self.builder.create_masked_load, self.builder.create_masked_store = self.load, self.store

    def times(self, kind, **tensors):
        """Name -> how often its elements were each "loaded" or "stored", and under "elsewhere" the other accesses.

        The count is an int where it is the same for all elements, else the (least, most).
        """
        addresses, found = np.concatenate(self.addresses[kind]).astype(np.int64), {}
        for name, tensor in tensors.items():
            offset = addresses - tensor.data_ptr()
            inside = (offset >= 0) & (offset < tensor.numel() * tensor.element_size())
            counts = np.bincount(offset[inside] // tensor.element_size(), minlength=tensor.numel())
            low, high = int(counts.min()), int(counts.max())
            found[name] = low if low == high else (low, high)
            addresses = addresses[~inside]
        return found | {"elsewhere": len(addresses)}
