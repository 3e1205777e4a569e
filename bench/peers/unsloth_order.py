"""Unsloth's order of operations, where unsloth is absent: bitsandbytes' decode, a matmul, the adapters by addmm."""

from __future__ import annotations

from typing import Any

import torch

from . import bnb

NAME = "unsloth's order"


def why_not() -> str | None:
    """Why it cannot run here."""
    return bnb.why_not()


class _LoRA(torch.autograd.Function):
    """y = x W^T + scaling x A^T B^T with every product in x's dtype; W is decoded again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.weight, ctx.scaling = weight, scaling
        y = x @ bnb.dequantize(weight.data, weight.quant_state).t()
        return y.addmm_(x @ lora_A.to(x.dtype).t(), lora_B.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        t = dy @ b
        dA = (t.t() @ x).mul_(ctx.scaling)
        dB = (dy.t() @ (x @ a.t())).mul_(ctx.scaling)
        dx = dy @ bnb.dequantize(ctx.weight.data, ctx.weight.quant_state)
        dx.addmm_(t, a, alpha=ctx.scaling)
        return dx, None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), None


def lora_linear(x: torch.Tensor, weight: Any, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
    """x (M, K), weight a Params4bit (N, K), lora_A (r, K), lora_B (N, r) -> (M, N)."""
    return _LoRA.apply(x, weight, lora_A, lora_B, scaling)
