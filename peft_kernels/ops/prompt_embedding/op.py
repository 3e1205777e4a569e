"""Learned tokens before embedded ones: the public function, its autograd Function and its library operations."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from ...autograd import once_differentiable
from ...checks import bad_type, bad_value, check_tensor
from . import reference

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define("prompt_embedding_forward(Tensor input_ids, Tensor weight, Tensor prompt, str backend) -> Tensor")
_lib.define("prompt_embedding_dprompt(Tensor dy, int tokens, ScalarType dtype, str backend) -> Tensor")
_lib.define("prompt_embedding_dweight(Tensor dy, Tensor input_ids, int vocabulary, str backend) -> Tensor")


def prompt_embedding(input_ids: torch.Tensor, embedding_weight: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Learned tokens before embedded ones: Y[b] = [prompt; E[ids[b]]].

    Backward dprompt = sum_b dY[b, :P], and dE[v] = the sum of dY over the places of id v.

    Args:
        input_ids: (B, L) int64 or int32.
        embedding_weight: (V, hidden) bfloat16, float16 or float32 (float64 on the reference path). Where it requires a
            gradient, that is dense.
        prompt: (P, hidden) of any floating dtype, shared by the batch.

    Returns:
        Tensor: (B, P + L, hidden) of the embedding's dtype, written once. Autocast does not change it.

    Only the ids are saved for backward, and only where the embedding is trained. Both gradients are summed in float32
    in a fixed order and rounded once.

    Raises:
        TypeError, ValueError: a shape, dtype or device does not fit; on the CPU, an id is outside the vocabulary.
        BackendError: the backend asked for by name cannot run this call.

    Source: prompt tuning, arXiv:2104.08691, section 2; P-tuning, arXiv:2103.10385, equation 1.
    """
    _check(input_ids, embedding_weight, prompt)
    backend = dispatch.choose("prompt_embedding", input_ids.device, (embedding_weight.dtype, prompt.dtype))
    if backend == "reference":
        return reference.prompt_embedding(input_ids, embedding_weight, prompt)
    if torch.is_grad_enabled() and (embedding_weight.requires_grad or prompt.requires_grad):
        return _PromptEmbedding.apply(input_ids, embedding_weight, prompt, backend)
    return torch.ops.peft_kernels.prompt_embedding_forward(input_ids, embedding_weight, prompt, backend)


def _check(input_ids: Any, embedding_weight: Any, prompt: Any) -> None:
    if not isinstance(input_ids, torch.Tensor):
        raise bad_type("input_ids", "a torch.Tensor", input_ids, "Pass a tensor.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise bad_value("input_ids", "int64 or int32", input_ids.dtype, "Pass token ids.")
    if input_ids.ndim != 2:
        raise bad_value("input_ids", "shape (B, L)", tuple(input_ids.shape), "Reshape it.")
    check_tensor("embedding_weight", embedding_weight, 2)
    check_tensor("prompt", prompt, 2)
    width = embedding_weight.shape[1]
    if prompt.shape[1] != width:
        raise bad_value(
            "prompt", f"shape {(prompt.shape[0], width)}", tuple(prompt.shape), "Match its width to the embedding's."
        )
    device = input_ids.device
    for name, tensor in (("embedding_weight", embedding_weight), ("prompt", prompt)):
        if tensor.device != device:
            raise bad_value(
                name, f"device {device} (that of input_ids)", tensor.device, f"Move it with .to('{device}')."
            )


class _PromptEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, backend: str):
        ctx.save_for_backward(*([input_ids] if ctx.needs_input_grad[1] else []))
        ctx.vocabulary, ctx.tokens, ctx.dtype, ctx.backend = weight.shape[0], prompt.shape[0], prompt.dtype, backend
        return torch.ops.peft_kernels.prompt_embedding_forward(input_ids, weight, prompt, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        ops = torch.ops.peft_kernels
        dweight = dprompt = None
        if ctx.needs_input_grad[1]:
            tokens = dy[:, ctx.tokens :]
            dweight = ops.prompt_embedding_dweight(tokens, *ctx.saved_tensors, ctx.vocabulary, ctx.backend)
        if ctx.needs_input_grad[2]:
            dprompt = ops.prompt_embedding_dprompt(dy, ctx.tokens, ctx.dtype, ctx.backend)
        return None, dweight, dprompt, None


@torch.library.impl(_lib, "prompt_embedding_forward", "CompositeExplicitAutograd")
def _forward(input_ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, backend: str):
    out = _forward_fake(input_ids, weight, prompt, backend)
    if out.numel():
        implementation = dispatch.implementation("prompt_embedding", backend)
        implementation.forward(input_ids.long().contiguous(), unit_rows(weight), unit_rows(prompt), out)
    return out


@torch.library.register_fake("peft_kernels::prompt_embedding_forward", lib=_lib)
def _forward_fake(input_ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor, backend: str):
    return weight.new_empty((input_ids.shape[0], prompt.shape[0] + input_ids.shape[1], weight.shape[1]))


@torch.library.impl(_lib, "prompt_embedding_dprompt", "CompositeExplicitAutograd")
def _dprompt(dy: torch.Tensor, tokens: int, dtype: torch.dtype, backend: str):
    out = _dprompt_fake(dy, tokens, dtype, backend)
    if dy.shape[0] == 0:
        return out.zero_()
    if out.numel():
        dispatch.implementation("prompt_embedding", backend).dprompt(unit_rows(dy), out)
    return out


@torch.library.register_fake("peft_kernels::prompt_embedding_dprompt", lib=_lib)
def _dprompt_fake(dy: torch.Tensor, tokens: int, dtype: torch.dtype, backend: str):
    return dy.new_empty((tokens, dy.shape[2]), dtype=dtype)


@torch.library.impl(_lib, "prompt_embedding_dweight", "CompositeExplicitAutograd")
def _dweight(dy: torch.Tensor, input_ids: torch.Tensor, vocabulary: int, backend: str):
    out = dy.new_zeros((vocabulary, dy.shape[2]))
    if dy.numel():
        ids, order = input_ids.long().flatten().sort(stable=True)
        dispatch.implementation("prompt_embedding", backend).dweight(unit_rows(dy), ids, order, out)
    return out


@torch.library.register_fake("peft_kernels::prompt_embedding_dweight", lib=_lib)
def _dweight_fake(dy: torch.Tensor, input_ids: torch.Tensor, vocabulary: int, backend: str):
    return dy.new_empty((vocabulary, dy.shape[2]))


def unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its rows contiguous; any other stride stays."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
