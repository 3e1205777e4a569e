"""The part over the keys: torch's own attention kernels, as a pair of functions that expose the log-sum-exp.

Backward needs no gradient of the log-sum-exp. A flash kernel recomputes its probabilities as exp(score - lse) and
subtracts sum(dO * O) from their gradients; given the *merged* output and the *merged* log-sum-exp, both are those of
the attention over everything, and dQ's part over the keys, dK and dV come out exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .arguments import rows_of_heads

aten = torch.ops.aten
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
    """dq (its part over the keys), dk and dv; `out` and `lse` are the merged ones."""
    if k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.device.type == "cpu":
        return _cpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale)
    return _gpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale)


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


def _flash_fits(q, k, mask, is_causal):
    """Flash kernels take half precision, no mask, whole vectors, and align causality at the bottom right."""
    aligned = q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return mask is None and q.dtype != torch.float32 and aligned and (not is_causal or q.shape[2] == k.shape[2])


def _gpu_forward(q, k, v, mask, is_causal, scale):
    k, v = (_repeat(t, q) for t in (k, v))
    if _flash_fits(q, k, mask, is_causal):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    q, k, v, bias, padded = _efficient_arguments(q, k, v, mask)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)
    return out[..., : out.shape[3] - padded], lse[..., : q.shape[2]].contiguous()


def _gpu_backward(dy, q, k, v, out, lse, mask, is_causal, scale):
    kv_heads = k.shape[1]
    k, v = (_repeat(t, q) for t in (k, v))
    if _flash_fits(q, k, mask, is_causal):
        # without cumulative lengths it is dense: even an empty tensor of them would mean ragged sequences
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dy, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, state, state[:0], scale=scale
        )
    else:
        q, k, v, bias, padded = _efficient_arguments(q, k, v, mask)
        if padded:
            dy, out = (F.pad(t, (0, padded)) for t in (dy, out))
        # taken for token-major, as its forward returns it, whatever the strides are
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # whole blocks, as its forward allocates them
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dy, q, k, v, bias, out, lse, seed, seed, 0.0, [True, True, True, False], is_causal, scale=scale
        )
        dq, dk, dv = (t[..., : t.shape[3] - padded] for t in (dq, dk, dv))
    if dk.shape[1] != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(dim=2, dtype=torch.float32).to(q.dtype) for t in (dk, dv))
    return dq, dk, dv


def _repeat(t, q):
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _efficient_arguments(q, k, v, mask):
    """Heads padded to whole vectors, and the mask expanded over rows of aligned length; the padding's width last."""
    padded = -q.shape[3] % 8
    if padded:
        q, k, v = (F.pad(t, (0, padded)) for t in (q, k, v))
    if mask is not None:
        keys = k.shape[2]
        mask = F.pad(mask.to(q.dtype).expand(*mask.shape[:-1], keys), (0, -keys % 8))[..., :keys]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)
    return q, k, v, mask, padded
