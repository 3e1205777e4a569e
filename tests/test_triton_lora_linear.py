"""The LoRA kernels, forward and every gradient, against a float64 reference with the same dropout seeds."""

import pytest
import torch
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels import Weight4bit, functional, use_backend
from peft_kernels.dropout import draw_seeds, scale_mask
from peft_kernels.ops.lora_linear import reference, triton_kernels
from peft_kernels.ops.lora_linear.adapters import Adapters
from peft_kernels.ops.lora_linear.triton_adapter import shrink
from peft_kernels.testing import assert_within_budget
from peft_kernels.triton_common.lowrank import LowRank, expand_add

__all__ = ["seed"]  # fixtures
FLOAT = torch.float32

# rows, N, K, ranks, adapter dtype (None: x's), quantized base, dropout, bias
CASES = {
    "one-row": (1, 96, 128, [16], None, True, 0.0, True),
    "few-rows-float32-adapter": (6, 70, 192, [20], FLOAT, "tiled", 0.0, True),
    "sixteen-rows": (16, 130, 320, [5], None, "tiled", 0.0, False),
    "float32-adapter-dropout": (5, 70, 192, [16], FLOAT, True, 0.1, False),
    "dense-base-dropout": (33, 70, 130, [3], None, False, 0.25, True),
    "two-adapters-dropout": (9, 40, 64, [3, 5], None, False, 0.25, True),
    "two-adapters-float32": (9, 40, 64, [3, 20], FLOAT, True, 0.0, True),
    "rank-above-a-tile": (70, 65, 67, [70], None, True, 0.5, True),
    "rank-one-and-widest": (21, 35, 64, [1, 256], FLOAT, True, 0.0, False),
    "several-tiles-of-dY": (130, 530, 64, [16], None, False, 0.0, False),
    "everything-dropped": (20, 65, 64, [8], None, False, 1.0, True),
}
if DEVICE.type == "cuda":
    CASES |= {
        "training": (1024, 4096, 14336, [16], None, True, 0.1, False),
        "training-float32-adapter": (1024, 4096, 4096, [16], FLOAT, True, 0.1, False),
        "decoding": (4, 4096, 14336, [16], None, True, 0.0, False),
        "decoding-tiled": (4, 4096, 14336, [16], None, "tiled", 0.0, False),
    }


class Call:
    """One random call and the reference's answers to it."""

    def __init__(self, rows, n, k, ranks, dtype, adapter_dtype, quantize, p, has_bias):
        base = randn(n, k, scale=0.1)
        self.weight = base.to(dtype)
        if quantize:
            self.weight = Weight4bit.quantize(base).with_layout("tiled" if quantize == "tiled" else "bnb")
        self.x, self.dy = randn(rows, k, dtype=dtype), randn(rows, n, dtype=dtype)
        self.lora_A = [randn(r, k, dtype=adapter_dtype, scale=0.1) for r in ranks]
        self.lora_B = [randn(n, r, dtype=adapter_dtype, scale=0.3) for r in ranks]
        self.scaling, self.p = [0.5 + i for i in range(len(ranks))], [p] * len(ranks)
        self.seeds = draw_seeds(self.p, DEVICE)
        self.bias = randn(n, dtype=dtype) if has_bias else None

    def by_reference(self, dtype, adapter_dtype):
        """[y, dx, *dA, *dB] in these dtypes."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, Weight4bit):
            weight = weight.dequantize(self.x.dtype)
        x = self.x.to(dtype).requires_grad_()
        lora_A = [a.to(adapter_dtype).requires_grad_() for a in self.lora_A]
        lora_B = [b.to(adapter_dtype).requires_grad_() for b in self.lora_B]
        adapters = Adapters(lora_A, lora_B, self.scaling, [None] * len(lora_A), self.p)
        y = reference.with_seeds(x, weight.to(dtype), adapters, None if bias is None else bias.to(dtype), self.seeds)
        return [y.detach(), *torch.autograd.grad(y, [x, *lora_A, *lora_B], self.dy.to(dtype))]

    @torch.no_grad()
    def by_kernels(self):
        common = (self.lora_A, self.lora_B, self.scaling, self.p, self.seeds)
        y, s = triton_kernels.forward(self.x, self.weight, self.bias, *common)
        dx, dA, dB = triton_kernels.backward(self.dy, self.x, self.weight, s, *common, True, True, True)
        return [y, dx, *dA, *dB]


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
@pytest.mark.parametrize("rows, n, k, ranks, adapter_dtype, quantize, p, has_bias", CASES.values(), ids=CASES)
def test_forward_and_gradients(rows, n, k, ranks, adapter_dtype, quantize, p, has_bias, dtype, poison):
    adapter_dtype = adapter_dtype or dtype
    call = Call(rows, n, k, ranks, dtype, adapter_dtype, quantize, p, has_bias)
    names = ["y", "dx", *(f"dA{i}" for i in range(len(ranks))), *(f"dB{i}" for i in range(len(ranks)))]
    exact, eager = call.by_reference(torch.float64, torch.float64), call.by_reference(dtype, adapter_dtype)
    ours = call.by_kernels()
    for name, *results in zip(names, ours, exact, eager, strict=True):
        assert_within_budget(*results, name)
    for first, second in zip(ours, call.by_kernels(), strict=True):
        assert torch.equal(first, second), "two runs differ"


def test_many_rows(monkeypatch, poison):
    """The vendor's GEMM adds to the low-rank term."""
    monkeypatch.setattr(triton_kernels.base, "fused", lambda *args: False)
    call = Call(70, 66, 130, [5], HALVES[0], HALVES[0], True, 0.3, True)
    exact, eager = call.by_reference(torch.float64, torch.float64), call.by_reference(HALVES[0], HALVES[0])
    for results in zip(call.by_kernels(), exact, eager, strict=True):
        assert_within_budget(*results)


def test_mask_is_the_definition():
    """Element for element the mask of `peft_kernels.dropout`, in the shrink and in the expand kernel."""
    seed = torch.tensor([-(2**62) + 12345], device=DEVICE)
    rows, k = 37, 77
    factors = scale_mask(seed[0], rows, k, 0.3)
    x = torch.ones(rows, k, device=DEVICE)
    through_shrink = torch.cat([shrink(x, row[None], 0.3, seed) for row in torch.eye(k, device=DEVICE)[::7]], dim=1)
    torch.testing.assert_close(through_shrink.double(), factors[:, ::7], rtol=1e-6, atol=0)
    out = torch.zeros(rows, k, device=DEVICE)
    ones = torch.ones(1, k, device=DEVICE)
    expand_add(out, LowRank(torch.ones(rows, 1, device=DEVICE), ones, 1.0, 0.3, seed))
    torch.testing.assert_close(out.double(), factors, rtol=1e-6, atol=0)


def test_only_what_is_needed():
    call = Call(5, 24, 64, [4], HALVES[0], HALVES[0], True, 0.0, False)
    common = (call.lora_A, call.lora_B, call.scaling, call.p, call.seeds)
    _, s = triton_kernels.forward(call.x, call.weight, None, *common)
    dx, dA, dB = triton_kernels.backward(call.dy, None, call.weight, s, *common, True, False, False)
    assert dx is not None and dA == [] and dB == []
    dx, dA, dB = triton_kernels.backward(call.dy, call.x, call.weight, s, *common, False, True, True)
    assert dx is None and len(dA) == len(dB) == 1


def test_public_function_and_gradient():
    call = Call(6, 24, 64, [4], HALVES[0], HALVES[0], True, 0.0, True)
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (call.x, call.lora_A[0], call.lora_B[0])]
        with use_backend(backend):
            y = functional.lora_linear(inputs[0], call.weight, *inputs[1:], scaling=0.5, dropout_p=0.0)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, call.dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
