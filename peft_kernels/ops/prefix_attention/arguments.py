"""The arguments that both prompt attentions take: checks, autocast, masks."""

from __future__ import annotations

import torch

from ...checks import autocasts, bad_type, bad_value, check_tensor


def check_attention(q: object, k: object, v: object) -> None:
    """q (B, H, L, D); k and v (B, Hkv, S, D) of one dtype and device, Hkv dividing H."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, 4)
    assert isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width or k.shape[1] == 0 or heads % k.shape[1]:
        expected = f"shape (B={batch}, Hkv dividing {heads}, S, D={width})"
        raise bad_value("k", expected, tuple(k.shape), "Match it to q (B, H, L, D).")
    if v.shape != k.shape:
        raise bad_value("v", f"shape {tuple(k.shape)} (that of k)", tuple(v.shape), "Match it to k.")
    autocast = autocasts(q.device)
    for name, value in (("k", k), ("v", v)):
        _check_device(name, value, q)
        if value.dtype != q.dtype and not autocast:
            raise bad_value(name, f"dtype {q.dtype} (that of q)", value.dtype, "Cast it to q's dtype.")


def check_prompt(kind: str, prompt_k: object, prompt_v: object, q: torch.Tensor, kv_heads: int) -> None:
    """Both (Hkv, P, D), or (B, Hkv, P, D) if they are a "prompt"; P at least 1, any floating dtype."""
    names = (f"{kind}_k", f"{kind}_v")
    batch, _, _, width = q.shape
    for name, value in zip(names, (prompt_k, prompt_v), strict=True):
        check_tensor(name, value, None if kind == "prompt" else 3)
        assert isinstance(value, torch.Tensor)
        _check_device(name, value, q)
        length = value.shape[-2] if value.ndim >= 2 else 0
        shared = (kv_heads, max(length, 1), width)
        if tuple(value.shape) != shared and not (kind == "prompt" and tuple(value.shape) == (batch, *shared)):
            expected = f"shape (Hkv={kv_heads}, P >= 1, D={width})"
            expected += f" or (B={batch}, ...) of those" if kind == "prompt" else ""
            raise bad_value(name, expected, tuple(value.shape), "It has k's heads and is not repeated over the batch.")
    assert isinstance(prompt_k, torch.Tensor) and isinstance(prompt_v, torch.Tensor)
    if prompt_k.shape != prompt_v.shape or prompt_k.dtype != prompt_v.dtype:
        expected = f"shape {tuple(prompt_k.shape)} and {prompt_k.dtype} (those of {names[0]})"
        raise bad_value(names[1], expected, f"{tuple(prompt_v.shape)} and {prompt_v.dtype}", f"Match it to {names[0]}.")


def check_mask(attn_mask: object, shape: tuple[int, int, int, int], q: torch.Tensor) -> None:
    """A bool or floating mask that broadcasts to (B, H, L, S), or None."""
    if attn_mask is None:
        return
    if not isinstance(attn_mask, torch.Tensor) or attn_mask.dtype != torch.bool:
        check_tensor("attn_mask", attn_mask)
    assert isinstance(attn_mask, torch.Tensor)
    _check_device("attn_mask", attn_mask, q)
    fits = attn_mask.ndim <= 4 and all(
        size in (1, wanted) for size, wanted in zip(attn_mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        expected = f"a shape that broadcasts to (B, H, L, S) = {shape}"
        raise bad_value("attn_mask", expected, tuple(attn_mask.shape), "It masks the keys only, never the prefix.")


def _check_device(name: str, value: torch.Tensor, q: torch.Tensor) -> None:
    if value.device != q.device:
        raise bad_value(name, f"device {q.device} (that of q)", value.device, f"Move it with .to('{q.device}').")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype where that is on, as torch's own attention casts them."""
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device.type)) for t in tensors)


def rows_of_heads(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with unit stride along the head's width, as every kernel reads them."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def additive_mask(
    attn_mask: torch.Tensor | None, is_causal: bool, length: int, keys: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """The mask as four-dimensional addends to the scores, causality included, or None if nothing is masked.

    Of `dtype` or float32: what torch's attention takes.
    """
    if is_causal:
        causal = torch.ones(length, keys, dtype=torch.bool, device=device).tril()
        if attn_mask is None:
            attn_mask = causal
        else:
            attn_mask = (
                attn_mask & causal if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~causal, -torch.inf)
            )
    if attn_mask is None:
        return None
    if attn_mask.dtype == torch.bool:
        zeros = torch.zeros(attn_mask.shape, dtype=dtype, device=device)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask.dtype not in (dtype, torch.float32):
        attn_mask = attn_mask.to(dtype)
    return attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)


def check_gate(gate: torch.Tensor | float, q: torch.Tensor) -> torch.Tensor:
    """The gate as a tensor (H,) or (1,)."""
    if not isinstance(gate, torch.Tensor):
        if not isinstance(gate, (int, float)):
            raise bad_type("gate", "a torch.Tensor or a number", gate, "Pass the factor itself.")
        gate = torch.tensor(gate, dtype=torch.float32, device=q.device)
    check_tensor("gate", gate)
    _check_device("gate", gate, q)
    if gate.numel() != 1 and tuple(gate.shape) != (q.shape[1],):
        expected = f"one element or shape (H,) = ({q.shape[1]},)"
        raise bad_value("gate", expected, tuple(gate.shape), "Reshape it; apply tanh before the call.")
    return gate.reshape(-1)


def check_mask_is_constant(attn_mask: torch.Tensor | None) -> None:
    """The kernels have no gradient of the mask."""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        remedy = "Detach it, or compute with peft_kernels.use_backend('reference')."
        raise bad_value("attn_mask", "a mask that needs no gradient", "requires_grad=True", remedy)
