"""The Triton prompt embedding equals the reference, rows bit for bit."""

import pytest
import torch
from triton_support import DEVICE, HALVES, randn, seed

from peft_kernels.ops.prompt_embedding import reference, triton_kernels

__all__ = ["seed"]  # fixtures


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 5), (3, 7, 5, 11, 64), (2, 4, 3, 9, 1030)], ids=str)
def test_against_the_reference(shape, dtype, poison):
    b, l, p, v, h = shape
    ids = torch.randint(0, v, (b, l), device=DEVICE)
    weight, prompt = randn(v, h, dtype=dtype).requires_grad_(), randn(p, h).requires_grad_()
    expected = reference.prompt_embedding(ids, weight, prompt)
    out = torch.empty_like(expected)
    triton_kernels.forward(ids, weight.detach(), prompt.detach(), out)
    assert torch.equal(out, expected)

    dy = randn(*out.shape, dtype=dtype)
    dweight, dprompt = torch.autograd.grad(
        reference.prompt_embedding(ids, weight.double(), prompt.double()), (weight, prompt), dy.double()
    )
    ours = torch.empty(p, h, device=DEVICE)
    triton_kernels.dprompt(dy, ours)
    torch.testing.assert_close(ours, dprompt)
    order = ids.flatten().sort(stable=True)
    summed = torch.zeros(v, h, dtype=dtype, device=DEVICE)
    triton_kernels.dweight(dy[:, p:], order.values, order.indices, summed)
    torch.testing.assert_close(summed, dweight)
