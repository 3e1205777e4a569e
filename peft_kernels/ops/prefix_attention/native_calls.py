"""The part over the prefix on the native core; the gated prompt's too, which differs by its gate."""

from __future__ import annotations

import functools

import torch

from ... import native
from . import library
from .arguments import rows_of_heads

# Causal keys up to which our kernel is faster than torch's, forward and backward, on two cores. In bfloat16, heads of
# 128, 512 and 2048 keys: Zen 4 3.1 x and 1.9 x; Skylake, which has no bfloat16, 4.5 x and 1.6 x, and 1.9 x at 512 with
# AVX2 alone. float16 on Skylake at 512 keys: 32 x. Longer sequences were not measured on Zen 4.
_OWN_KEYS = 2048
# In float32 on Skylake: 1.4 x at 512 keys, 0.6 x at 2048; with AVX2 alone 0.7 x; not measured on Zen 4.
_OWN_KEYS_FLOAT32 = 512


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native core cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def keys_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp (B, H, L) of attention over the keys; see `library.forward`."""
    if not own_keys(q, k, mask):
        out, lse = library.forward(q, k, v, mask, is_causal, scale)
        return out, lse.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _forward(q, k, v, None, lse, None, scale, out, is_causal)
    return out, lse


def keys_backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> library.Triple:
    """dq (its part over the keys), dk and dv; see `library.backward`."""
    if not own_keys(q, k, mask):
        if native.multiplies(q.dtype):
            return library.backward(dy, q, k, v, out, lse, mask, is_causal, scale)
        # torch would widen number by number: in bfloat16 2 to 3 times, in float16 18 to 28 times as slow on Skylake
        mask = None if mask is None else mask.float()
        dq, dk, dv = library.backward(
            dy.float(), q.float(), k.float(), v.float(), out.float(), lse, mask, is_causal, scale
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    dq, dk, dv = (library.token_major(t) for t in (q, k, v))
    _backward(dy, q, k, v, out, lse, None, scale, dq, False, dk, dv, is_causal)
    return dq, dk, dv


def own_keys(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether our kernel takes the keys too, each sample's as a prompt of its own."""
    if mask is not None or k.shape[2] == 0:
        return False
    if q.shape[2] == 1:  # of one token torch's takes 5.4 ms to our 1.0 (Skylake); not so of grouped heads or float16
        return q.dtype == torch.bfloat16 and q.shape[1] == k.shape[1] and _own_keys(q.dtype) > 0
    return k.shape[2] <= _own_keys(q.dtype)


def _own_keys(dtype: torch.dtype) -> int:
    """The longest sequence whose keys our kernel takes too, where that was measured."""
    isa = native.core().isa()
    if dtype == torch.float32:
        return _OWN_KEYS_FLOAT32 if isa == "avx512" else 0
    if isa == "scalar" or (native.multiplies(dtype) and (dtype == torch.float16 or _has_amx())):
        return 0
    return _OWN_KEYS


_own_keys._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch: its argument is a constant


@functools.cache
def _has_amx() -> bool:
    """torch's attention uses AMX where a processor has it; against that our kernel was never measured."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def forward(
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    base: torch.Tensor,
    lse: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write `out` and `lse` (B, H, L); q, base and out (B, H, L, D), out may be base.

    Without a gate, base and lse are those of the other keys, and out and lse become those of all of them. With one,
    (H,) float32, out = base + gate * attention(q, prompts) and lse becomes the prompts' own.
    """
    _forward(q, prompt_k, prompt_v, base, lse, gate, scale, out, False)


def _forward(q, prompt_k, prompt_v, base, lse, gate, scale, out, causal):
    native.core().prompt_attention_forward(
        _shape(q, prompt_k, causal, scale),
        _heads(q),
        _heads(prompt_k),
        _heads(prompt_v),
        _heads(base),
        lse.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        _heads(out),
    )


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    dq: torch.Tensor | None,
    need_prompts: bool,
    *,
    add_dq: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dprompt_k, dprompt_v, dgate (H,) float32 or None), the first two empty unless needed; lse as `forward` left it.

    Without a gate, `out` is the forward's and the prompts' part is added to dq; with one, dq is written, or added
    to where `add_dq`.
    """
    dprompts = [p.new_empty(p.shape if need_prompts else 0) for p in (prompt_k, prompt_v)]
    dk, dv = dprompts if need_prompts else (None, None)
    add_dq = add_dq or gate is None
    dgate = _backward(dy, q, prompt_k, prompt_v, out, lse, gate, scale, dq, add_dq, dk, dv, False)
    return dprompts[0], dprompts[1], dgate


def _backward(dy, q, prompt_k, prompt_v, out, lse, gate, scale, dq, add_dq, dprompt_k, dprompt_v, causal):
    (dy,) = rows_of_heads(dy)
    dgate = None if gate is None else torch.empty_like(gate)
    native.core().prompt_attention_backward(
        _shape(q, prompt_k, causal, scale),
        _heads(dy),
        _heads(q),
        _heads(prompt_k),
        _heads(prompt_v),
        _heads(out),
        lse.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        _heads(dq),
        add_dq,
        _heads(dprompt_k),
        _heads(dprompt_v),
        0 if dgate is None else dgate.data_ptr(),
    )
    return dgate


def _heads(t: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of (B, H, L, D), or of (H, L, D) that all samples share."""
    if t is None:
        return 0, 0, 0, 0
    assert t.stride(-1) == 1 or t.shape[-1] == 1
    return t.data_ptr(), t.stride(0) if t.ndim == 4 else 0, t.stride(-3), t.stride(-2)


def _shape(q: torch.Tensor, prompt: torch.Tensor, causal: bool, scale: float) -> tuple:
    batch, heads, length, width = q.shape
    codes = native.dtype_code(q.dtype), native.dtype_code(prompt.dtype)
    return *codes, batch, heads, prompt.shape[-3], length, width, prompt.shape[-2], prompt.ndim == 4, causal, scale
