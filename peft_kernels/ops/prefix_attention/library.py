"""The part over the keys: torch's own attention kernels, as a pair of functions that expose the log-sum-exp.

Backward needs no gradient of the log-sum-exp. Each of torch's fused kernels recomputes its probabilities as
exp(score - lse) and subtracts sum(dO * O) from their gradients; given the *merged* output and the *merged* log-sum-exp,
both are those of the attention over everything, and dQ's part over the keys, dK and dV come out exact.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from .arguments import rows_of_heads

aten = torch.ops.aten
_FLASH, _EFFICIENT, _CUDNN = (
    getattr(SDPBackend, name).value for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
)
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, L, D) and log-sum-exp (B, H, L) float32 of attention over the keys; -inf where all are masked.

    mask is additive, or None. k and v may have fewer heads than q.
    """
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if q.device.type == "cpu":
        out, lse = _cpu_forward(q, k, v, mask, is_causal, scale)
    else:
        out, lse = _gpu_forward(q, k, v, mask, is_causal, scale)
    if mask is not None:  # the kernels give such rows a zero output and any log-sum-exp
        lse = lse.masked_fill((mask == -torch.inf).all(dim=-1), -torch.inf)
    return out, lse


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> Triple:
    """dq (its part over the keys), dk and dv; `out`, laid out as torch.empty_like(q), and `lse` are the merged ones."""
    if k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.device.type == "cpu":
        return _cpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale)
    return _gpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale)


def is_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> bool:
    """Whether `forward` is torch's scaled_dot_product_attention on a GPU, bit for bit, unless cuDNN refuses."""
    if q.device.type != "cuda" or mask is not None or q.shape[2] == 1 or q.numel() == 0 or k.shape[2] == 0:
        return False
    whole = q.shape[3] % 8 == 0 and q.shape[3] <= 128 and all(t.stride(3) == 1 for t in (q, k, v))
    return whole and _kernel(q, k, v, mask, is_causal, scale, False) != _EFFICIENT


def token_major(t: torch.Tensor) -> torch.Tensor:
    """An empty (B, H, S, D) laid out as (B, S, H, D): what the flash kernels return."""
    return t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)


def _cpu_forward(q, k, v, mask, is_causal, scale):
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    if q.shape[1] == k.shape[1]:
        return flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    rows = _group_as_rows(q, k, mask, is_causal)
    if rows is not None:
        out, lse = flash(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for b in range(q.shape[0]):
        parts = flash(*_grouped(q[b], k[b], v[b]), 0.0, is_causal, attn_mask=_of_sample(mask, b, k), scale=scale)
        out[b], lse[b] = (part.flatten(0, 1) for part in parts)
    return out, lse


def _cpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale):
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    (dy,) = rows_of_heads(dy)
    if q.shape[1] == k.shape[1]:
        return flash(dy, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        q_b, k_b, v_b = _grouped(q[b], k[b], v[b])
        dy_b, out_b, lse_b = (t[b].unflatten(0, (-1, groups)) for t in (dy, out, lse))
        parts = flash(dy_b, q_b, k_b, v_b, out_b, lse_b, 0.0, is_causal, attn_mask=_of_sample(mask, b, k), scale=scale)
        dq[b] = parts[0].flatten(0, 1)
        dk[b], dv[b] = (part.sum(dim=1, dtype=torch.float32) for part in parts[1:])
    return dq, dk, dv


def _group_as_rows(q, k, mask, is_causal):
    """One decoded token's heads of a group as the rows of one head, so that each key is read once; or None."""
    if q.shape[2] != 1 or is_causal or (mask is not None and mask.shape[1] != 1):
        return None
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def _grouped(q, k, v):
    """One sample with the groups as heads and k's heads as the batch: views, so that no head is repeated in memory."""
    groups = q.shape[0] // k.shape[0]
    k, v = (t[:, None].expand(-1, groups, -1, -1) for t in (k, v))
    return q.unflatten(0, (-1, groups)), k, v


def _of_sample(mask, b, k):
    """The mask (Hkv or 1, group or 1, L, S) of sample b."""
    if mask is None:
        return None
    sample = mask[b if mask.shape[0] > 1 else 0]
    return sample[None] if sample.shape[0] == 1 else sample.unflatten(0, (k.shape[1], -1))


def _gpu_forward(q, k, v, mask, is_causal, scale):
    width = q.shape[3]
    q, k, v = _whole_vectors(q, k, v)
    kernel = _kernel(q, k, v, mask, is_causal, scale, False)
    if kernel == _CUDNN:
        try:
            out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[:2]
            return _narrow(out, width), lse.reshape(q.shape[:3])
        except RuntimeError as error:
            kernel = _without_cudnn(error, q, k, v, is_causal, False)
    if kernel == _FLASH:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
        return _narrow(out, width), lse
    k, v, mask = _efficient_arguments(q, k, v, mask)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal, scale=scale)
    return _narrow(out, width), lse[..., : q.shape[2]].contiguous()


def _gpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale):
    width, kv_heads, lengths = q.shape[3], k.shape[1], (q.shape[2], k.shape[2])
    dy, q, k, v, out = _whole_vectors(dy, q, k, v, out)
    kernel = _kernel(q, k, v, mask, is_causal, scale, True)
    seed = q.new_empty((), dtype=torch.int64)  # of the dropout that there is none of
    grads = None
    if kernel == _CUDNN:
        # torch finds an earlier call's plan by the strides of q, k and v: those of out and dy must follow from them
        strided = dy if dy.stride() == out.stride() else torch.empty_like(out).copy_(dy)
        stats = lse if _cudnn_lse_dimensions() == 3 else lse[..., None]
        try:
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                strided, q, k, v, out, stats, seed, seed, None, None, None, *lengths, 0.0, is_causal, scale=scale
            )
        except RuntimeError as error:
            kernel = _without_cudnn(error, q, k, v, is_causal, True)
    if kernel == _FLASH:
        # without cumulative lengths it is dense: even an empty tensor of them would mean ragged sequences
        state = q.new_empty(2, dtype=torch.uint64)
        grads = aten._scaled_dot_product_flash_attention_backward(
            dy, q, k, v, out, lse, None, None, *lengths, 0.0, is_causal, state, state[:0], scale=scale
        )
    if grads is None:
        k, v, mask = _efficient_arguments(q, k, v, mask)
        # taken for token-major, as its forward returns it, whatever the strides are
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # whole blocks, as its forward allocates them
        grads = aten._scaled_dot_product_efficient_attention_backward(
            dy, q, k, v, mask, out, lse, seed, seed, 0.0, [True, True, True, False], is_causal, scale=scale
        )[:3]
    dq, dk, dv = (_narrow(grad, width) for grad in grads)
    if dk.shape[1] != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(dim=2, dtype=torch.float32).to(q.dtype) for t in (dk, dv))
    return dq, dk, dv


def _kernel(q, k, v, mask, is_causal, scale, backward):
    """The kernel that torch would take, by its number, if it takes grouped heads too; else the efficient one.

    That one takes a mask, float32 and causality between unequal lengths. Only these three expose the log-sum-exp.
    """
    fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
    if mask is not None or q.dtype == torch.float32 or not fused:
        return _EFFICIENT
    grouped = q.shape[1] != k.shape[1]
    kernel = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    if kernel == _CUDNN:
        # it plans anew for every length, and a cache grows by one: a plan takes longer than many steps of decoding
        decoding = q.shape[2] == 1 and _flash_fits(q, k, is_causal)
        if decoding or (_refused and _call(q, k, v, is_causal, backward) in _refused):
            return _FLASH if _flash_fits(q, k, is_causal) else _EFFICIENT
    return kernel if kernel in (_CUDNN, _FLASH) else _EFFICIENT


def _flash_fits(q, k, is_causal):
    """Whether flash is there and wanted; its kernels align causality at the bottom right."""
    usable = torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available()
    return usable and q.shape[3] <= 256 and (not is_causal or q.shape[2] == k.shape[2])


# Calls for which cuDNN turned out to have no plan. It takes long to say so, and torch does not remember it.
_refused: set[tuple] = set()
_MOST_REFUSED = 4096


def _call(q, k, v, is_causal, backward):
    return (q.dtype, *((*t.shape, *t.stride()) for t in (q, k, v)), is_causal, backward)


def _without_cudnn(error, q, k, v, is_causal, backward):
    """Another kernel's number for a call that cuDNN refused; other errors go on."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
        raise error
    if len(_refused) >= _MOST_REFUSED:
        _refused.clear()
    _refused.add(_call(q, k, v, is_causal, backward))
    return _FLASH if _flash_fits(q, k, is_causal) else _EFFICIENT


@functools.cache
def _cudnn_lse_dimensions() -> int:
    """4 with a last one of size 1, as most versions of torch have it, or 3."""
    q = torch.empty(1, 1, 8, 8, dtype=torch.bfloat16, device="meta")
    return aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].ndim


def _whole_vectors(*tensors):
    """The heads padded with zeros to a multiple of 8."""
    padded = -tensors[0].shape[3] % 8
    return [F.pad(t, (0, padded)) for t in tensors] if padded else tensors


def _narrow(t, width):
    return t if t.shape[3] == width else t[..., :width]


def _efficient_arguments(q, k, v, mask):
    """k and v with q's heads, and the mask expanded over rows of aligned length."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if mask is not None:
        keys = k.shape[2]
        mask = F.pad(mask.to(q.dtype).expand(*mask.shape[:-1], keys), (0, -keys % 8))[..., :keys]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)
    return k, v, mask
