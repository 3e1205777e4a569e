"""The part over the prefix on the GPU; the gated prompt's too, which differs by its gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ...triton_common import why_not_tensors
from ...triton_common.launch import launch, target
from ...triton_common.planes import split_count, sum_planes
from . import explicit, library
from .arguments import rows_of_heads
from .triton_device import _prompt_attention_dkv_kernel, _prompt_attention_dq_kernel, _prompt_attention_fwd_kernel


class _Tile(NamedTuple):
    """Queries and prompt tokens of a tile, and its warps."""

    block_l: int
    block_p: int
    num_warps: int


# By whether products are of 16 bits, and by the padded width of a head; others go by torch's products. Set from
# compiled objects, not measured: no spills on any target. In float32 each operand is three of bfloat16, which a wide
# head's rows do not leave registers for.
_TILES = {
    (True, 64): _Tile(64, 32, 4),
    (True, 128): _Tile(32, 32, 4),
    (True, 256): _Tile(16, 32, 4),
    (False, 64): _Tile(16, 16, 4),
}


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot serve such tensors."""
    return why_not_tensors(device, dtypes)


def keys_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp (B, H, L) of attention over the keys; see `library.forward`."""
    out, lse = library.forward(q, k, v, mask, is_causal, scale)
    return out, lse.contiguous()


keys_backward = library.backward


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
    """Write `out` and `lse`; see `native_calls.forward`."""
    if _key(q) not in _TILES:
        return explicit.forward(q, prompt_k, prompt_v, base, lse, gate, scale, out)
    shared, tile = _arguments(q, prompt_k, prompt_v, gate, scale)
    batch, heads, length, _ = q.shape
    launch(
        _prompt_attention_fwd_kernel,
        (triton.cdiv(length, tile.block_l), heads, batch),
        q.device,
        in_ptr=base,
        lse_ptr=lse,
        out_ptr=out,
        **_strides("i", base),
        **_strides("o", out),
        **shared,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dprompt_k, dprompt_v, dgate or None); see `native_calls.backward`."""
    if _key(q) not in _TILES:
        return explicit.backward(dy, q, prompt_k, prompt_v, out, lse, gate, scale, dq, need_prompts)
    (dy,) = rows_of_heads(dy)
    shared, tile = _arguments(q, prompt_k, prompt_v, gate, scale)
    batch, heads, length, _ = q.shape
    delta = torch.empty_like(lse)
    launch(
        _prompt_attention_dq_kernel,
        (triton.cdiv(length, tile.block_l), heads, batch),
        q.device,
        dy_ptr=dy,
        in_ptr=out,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        **_strides("y", dy),
        **_strides("i", out),
        **_strides("d", dq),
        HAS_DQ=dq is not None,
        **shared,
    )
    dgate = None if gate is None else delta.sum(dim=(0, 2))
    if not need_prompts:
        return prompt_k.new_empty(0), prompt_v.new_empty(0), dgate
    return *_prompt_gradients(dy, q, prompt_k, prompt_v, lse, delta, shared, tile), dgate


def _prompt_gradients(
    dy: torch.Tensor,
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    shared: dict[str, Any],
    tile: _Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dprompt_k and dprompt_v: a split reduction over the queries, whose planes stay at an eighth of q's bytes."""
    batch, heads, length, _ = q.shape
    per_sample = prompt_k.ndim == 4
    grid = (triton.cdiv(prompt_k.shape[-2], tile.block_p), prompt_k.shape[-3] * (batch if per_sample else 1))
    steps = (1 if per_sample else batch) * heads // prompt_k.shape[-3] * triton.cdiv(length, tile.block_l)
    most = max(1, q.numel() * q.element_size() // (64 * prompt_k.numel()))
    per_split = triton.cdiv(steps, split_count(grid[0] * grid[1], steps, most, target(q.device)))
    splits = triton.cdiv(steps, per_split)
    planes = torch.empty((2, splits, *prompt_k.shape), dtype=torch.float32, device=q.device)
    launch(
        _prompt_attention_dkv_kernel,
        (*grid, splits),
        q.device,
        dy_ptr=dy,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=planes[0],
        dv_ptr=planes[1],
        steps=steps,
        per_split=per_split,
        **_strides("y", dy),
        PER_SAMPLE=per_sample,
        **shared,
    )
    sums = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (prompt_k, prompt_v))
    dprompt_k, dprompt_v = (sum_planes(plane, total) for plane, total in zip(planes, sums, strict=True))
    return dprompt_k, dprompt_v


def _arguments(
    q: torch.Tensor, prompt_k: torch.Tensor, prompt_v: torch.Tensor, gate: torch.Tensor | None, scale: float
) -> tuple[dict[str, Any], _Tile]:
    """What every kernel takes, and its tile."""
    width, prompt = q.shape[3], prompt_k.shape[-2]
    half, block_d = _key(q)
    prompt_k, prompt_v = prompt_k.to(q.dtype), prompt_v.to(q.dtype)
    tile = _TILES[half, block_d]
    tile = tile._replace(block_p=max(16, min(tile.block_p, triton.next_power_of_2(prompt))))
    tile = tile._replace(block_l=max(16, min(tile.block_l, triton.next_power_of_2(q.shape[2]))))
    shared = {
        "q_ptr": q,
        "k_ptr": prompt_k,
        "v_ptr": prompt_v,
        "gate_ptr": gate,
        "L": q.shape[2],
        "D": width,
        "P": prompt,
        "H": q.shape[1],
        "groups": q.shape[1] // prompt_k.shape[-3],
        "scale": scale,
        **_strides("q", q),
        **_strides("k", prompt_k),
        **_strides("v", prompt_v),
        "GATED": gate is not None,
        "PIECES": 1 if half else 6,
        "BLOCK_L": tile.block_l,
        "BLOCK_P": tile.block_p,
        "BLOCK_D": block_d,
        "num_warps": tile.num_warps,
        "num_stages": 1,
    }
    return shared, tile


def _key(q: torch.Tensor) -> tuple[bool, int]:
    """Of `_TILES`."""
    return q.dtype != torch.float32, max(64, triton.next_power_of_2(q.shape[3]))


def _strides(letter: str, t: torch.Tensor | None) -> dict[str, int]:
    """Strides of (B, H, L, D) or, without one of the batch, of (H, L, D)."""
    strides = (0, 0, 0) if t is None else (t.stride(0) if t.ndim == 4 else 0, t.stride(-3), t.stride(-2))
    return dict(zip((f"stride_{letter}b", f"stride_{letter}h", f"stride_{letter}l"), strides, strict=True))
