"""The part over the prefix on the GPU; the gated prompt's too, which differs by its gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...triton_common import why_not_tensors
from ...triton_common.launch import cdiv, launch, power_of_two, target
from ...triton_common.planes import split_count, sum_planes
from . import explicit, library
from .arguments import rows_of_heads
from .triton_device import (
    _prompt_attention_bwd_kernel,
    _prompt_attention_dkv_kernel,
    _prompt_attention_dq_kernel,
    _prompt_attention_fwd_kernel,
)


class _Tile(NamedTuple):
    """Queries and prompt tokens of a tile, its warps, and how many tiles of queries are under way."""

    block_l: int
    block_p: int
    num_warps: int
    stages: int = 1


class _Tiles(NamedTuple):
    """Of each kernel; `whole`, of the one that computes all gradients, takes prompts of one tile."""

    forward: _Tile
    dq: _Tile
    dkv: _Tile
    whole: _Tile | None


# By whether products are of 16 bits, and by the padded width of a head; others go by torch's products. Set from
# compiled objects, for targets without a row below: no spills on any. In float32 each operand is three of bfloat16,
# which a wide head's rows do not leave registers for.
_TILES = {
    (True, 64): _Tiles(_Tile(64, 32, 4), _Tile(64, 32, 4), _Tile(64, 32, 4), _Tile(32, 64, 4)),
    (True, 128): _Tiles(_Tile(32, 32, 4), _Tile(32, 32, 4), _Tile(32, 32, 4), _Tile(32, 32, 4)),
    (True, 256): _Tiles(_Tile(16, 32, 4), _Tile(16, 32, 4), _Tile(16, 32, 4), None),
    (False, 64): _Tiles(_Tile(16, 16, 4), _Tile(16, 16, 4), _Tile(16, 16, 4), None),
}
# Measured on H100 for bfloat16 heads of 128, B 4, H 32, us of forward, and of dq, against the tile above: 12.0 and 14.2
# (16.4, 90) at L 64, 38 and 91 (69, 133) at L 512, 90 and 133 (109, 142) at L 2048. `whole` takes 59 at L 512 and 161
# at L 2048; 64 rows would take 51 and 138, but spill.
_HOPPER_TILES = {
    (True, 64): _TILES[True, 64]._replace(whole=_Tile(64, 64, 4)),
    (True, 128): _Tiles(_Tile(64, 64, 4), _Tile(64, 64, 4), _Tile(64, 64, 4), _Tile(32, 64, 4)),
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
    tile = _clamped(_tiles(q).forward, q, prompt_k)
    shared = _arguments(q, prompt_k, prompt_v, gate, scale, tile)
    batch, heads, length, _ = q.shape
    launch(
        _prompt_attention_fwd_kernel,
        (cdiv(length, tile.block_l), heads, batch),
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
    *,
    add_dq: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dprompt_k, dprompt_v, dgate or None); see `native_calls.backward`."""
    add_dq = add_dq or gate is None
    if _key(q) not in _TILES:
        return explicit.backward(dy, q, prompt_k, prompt_v, out, lse, gate, scale, dq, need_prompts, add_dq)
    (dy,) = rows_of_heads(dy)
    tiles = _tiles(q)
    whole = tiles.whole if need_prompts and tiles.whole and prompt_k.shape[-2] <= tiles.whole.block_p else None
    delta = None if whole and gate is None else torch.empty_like(lse)
    queries: dict[str, Any] = {
        "dy_ptr": dy,
        "in_ptr": out,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dq_ptr": dq,
        **_strides("y", dy),
        **_strides("i", out),
        **_strides("d", dq),
        "HAS_DQ": dq is not None,
        "ADD_DQ": add_dq,
    }
    if whole:
        tile = _clamped(whole, q, prompt_k)
        shared = _arguments(q, prompt_k, prompt_v, gate, scale, tile)
        dprompts = _split(_prompt_attention_bwd_kernel, q, prompt_k, tile, {**queries, **shared, "STAGES": tile.stages})
    else:
        tile = _clamped(tiles.dq, q, prompt_k)
        shared = _arguments(q, prompt_k, prompt_v, gate, scale, tile)
        grid = (cdiv(q.shape[2], tile.block_l), q.shape[1], q.shape[0])
        launch(_prompt_attention_dq_kernel, grid, q.device, **queries, **shared)
    dgate = None if gate is None or delta is None else delta.sum(dim=(0, 2))
    if not need_prompts:
        return prompt_k.new_empty(0), prompt_v.new_empty(0), dgate
    if not whole:
        tile = _clamped(tiles.dkv, q, prompt_k)
        shared = _arguments(q, prompt_k, prompt_v, gate, scale, tile)
        rows = {"dy_ptr": dy, "lse_ptr": lse, "delta_ptr": delta, **_strides("y", dy)}
        dprompts = _split(_prompt_attention_dkv_kernel, q, prompt_k, tile, {**rows, **shared})
    return dprompts[0], dprompts[1], dgate


def _split(kernel: Any, q: torch.Tensor, prompt: torch.Tensor, tile: _Tile, arguments: dict[str, Any]) -> torch.Tensor:
    """(2, *prompt.shape), both prompts' gradients: a split reduction, its planes at most half of q's bytes or 8 MiB."""
    batch, heads, length, _ = q.shape
    per_sample = prompt.ndim == 4
    programs = (cdiv(prompt.shape[-2], tile.block_p), prompt.shape[-3] * (batch if per_sample else 1))
    steps = (1 if per_sample else batch) * heads // prompt.shape[-3] * cdiv(length, tile.block_l)
    most = max(1, max(q.numel() * q.element_size(), 1 << 24) // (16 * prompt.numel()))
    splits = split_count(programs[0] * programs[1], steps, most, target(q.device))
    per_split = cdiv(steps, splits)
    splits = cdiv(steps, per_split)
    sums = torch.empty((2, *prompt.shape), dtype=prompt.dtype, device=q.device)
    planes = sums if splits == 1 else torch.empty((splits, *sums.shape), dtype=torch.float32, device=q.device)
    arguments |= {"dkv_ptr": planes, "steps": steps, "per_split": per_split, "PER_SAMPLE": per_sample}
    launch(kernel, (*programs, splits), q.device, **arguments)
    return sums if splits == 1 else sum_planes(planes, sums)


def _arguments(
    q: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    tile: _Tile,
) -> dict[str, Any]:
    """What every kernel takes."""
    half, block_d = _key(q)
    prompt_k, prompt_v = prompt_k.to(q.dtype), prompt_v.to(q.dtype)
    return {
        "q_ptr": q,
        "k_ptr": prompt_k,
        "v_ptr": prompt_v,
        "gate_ptr": gate,
        "L": q.shape[2],
        "D": q.shape[3],
        "P": prompt_k.shape[-2],
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


def _tiles(q: torch.Tensor) -> _Tiles:
    key = _key(q)
    hopper = _HOPPER_TILES if target(q.device).arch == 90 else {}
    return hopper.get(key) or _TILES[key]


def _clamped(tile: _Tile, q: torch.Tensor, prompt: torch.Tensor) -> _Tile:
    """No wider than the queries and the prompt; a matrix product takes 16 rows at least."""
    length, tokens = (max(16, power_of_two(t.shape[-2])) for t in (q, prompt))
    return tile._replace(block_l=min(tile.block_l, length), block_p=min(tile.block_p, tokens))


def _key(q: torch.Tensor) -> tuple[bool, int]:
    """Of the tables of tiles."""
    return q.dtype != torch.float32, max(64, power_of_two(q.shape[3]))


def _strides(letter: str, t: torch.Tensor | None) -> dict[str, int]:
    """Strides of (B, H, L, D) or, without one of the batch, of (H, L, D)."""
    strides = (0, 0, 0) if t is None else (t.stride(0) if t.ndim == 4 else 0, t.stride(-3), t.stride(-2))
    return dict(zip((f"stride_{letter}b", f"stride_{letter}h", f"stride_{letter}l"), strides, strict=True))
