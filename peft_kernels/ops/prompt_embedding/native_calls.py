"""`prompt_embedding` on the native core."""

from __future__ import annotations

import torch

from ... import native


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def forward(input_ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, out: torch.Tensor) -> None:
    """out (B, P + L, hidden) = [prompt; E[ids]]; the few rows of the prompt are cast first, then copied B times."""
    prompt = prompt.to(out.dtype)
    native.core().prompt_embedding_forward(
        input_ids.data_ptr(),
        *input_ids.shape,
        weight.data_ptr(),
        weight.shape[0],
        weight.stride(0),
        prompt.data_ptr(),
        prompt.shape[0],
        prompt.stride(0),
        out.shape[2],
        native.dtype_code(out.dtype),
        out.data_ptr(),
    )


def dprompt(dy: torch.Tensor, out: torch.Tensor) -> None:
    """out (P, hidden) = the sum over the batch of the first P rows of dy (B, P + L, hidden)."""
    native.core().prompt_embedding_dprompt(
        dy.data_ptr(),
        native.dtype_code(dy.dtype),
        dy.shape[0],
        dy.stride(0),
        dy.stride(1),
        out.data_ptr(),
        native.dtype_code(out.dtype),
        *out.shape,
    )


def dweight(dy: torch.Tensor, ids: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """Rows ids of out (V, hidden), which is zero elsewhere = the sums of the rows of dy (B, L, hidden) in `order`."""
    native.core().prompt_embedding_dweight(
        dy.data_ptr(),
        native.dtype_code(dy.dtype),
        dy.shape[1],
        dy.stride(0),
        dy.stride(1),
        ids.data_ptr(),
        order.data_ptr(),
        ids.numel(),
        out.data_ptr(),
        out.shape[1],
    )
