"""The Triton kernels of the prompt attentions: forward, dq, and the prompts' own gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common.device import dot_wide


@triton.jit
def _load_rows(ptr, row, rows, D, stride, BLOCK_D: tl.constexpr):
    """Rows of a head, zero outside."""
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(ptr, value, row, rows, D, stride, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_dkv(ptr, dk, dv, split, head, heads, p, P, D, BLOCK_D: tl.constexpr):
    """Of a head, to (splits, 2, heads, P, D)."""
    ptr += (2 * split.to(tl.int64) * heads + head) * P * D
    _store_rows(ptr, dk, p, P, D, D, BLOCK_D)
    _store_rows(ptr + heads.to(tl.int64) * P * D, dv, p, P, D, D, BLOCK_D)


@triton.jit
def _scores(q, k, p, P, scale, PIECES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_L, BLOCK_P], -inf past the prompt's end."""
    s = dot_wide(q, tl.trans(k), tl.zeros([BLOCK_L, BLOCK_P], tl.float32), PIECES) * scale
    return tl.where((p < P)[None, :], s, -float("inf"))


@triton.jit
def _prompt_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, in_ptr, lse_ptr, gate_ptr, out_ptr, L, D, P, H, groups, scale,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ib, stride_ih, stride_il, stride_ob, stride_oh, stride_ol,
    GATED: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries: the prompt's attention merged with, or gated onto, what `in` holds."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, l, L, D, stride_ql, BLOCK_D)
    in_ptr += b * stride_ib + h * stride_ih
    if PIECES == 1:  # under way during the loop; float32 rows would not fit the registers
        base = _load_rows(in_ptr, l, L, D, stride_il, BLOCK_D)
    k_ptr += b * stride_kb + h // groups * stride_kh
    v_ptr += b * stride_vb + h // groups * stride_vh
    most = tl.full([BLOCK_L], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        k = _load_rows(k_ptr, p, P, D, stride_kl, BLOCK_D)
        s = _scores(q, k, p, P, scale, PIECES, BLOCK_L, BLOCK_P)
        higher = tl.maximum(most, tl.max(s, 1))
        weight = tl.exp(s - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, 1)
        v = _load_rows(v_ptr, p, P, D, stride_vl, BLOCK_D)
        acc = dot_wide(weight.to(q.dtype), v, acc * shrink[:, None], PIECES)
        most = higher
    lse_ptr += (b * H + h) * L + l
    lse = most + tl.log(total)
    if PIECES != 1:
        base = _load_rows(in_ptr, l, L, D, stride_il, BLOCK_D)
    base = base.to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + h)
        out = base + acc * (gate / total)[:, None]
        out = tl.where(gate == 0.0, base, out)  # its signed zeros too
    else:
        other = tl.load(lse_ptr, mask=l < L, other=0.0)
        higher = tl.maximum(other, lse)
        merged = higher + tl.log(tl.exp(other - higher) + tl.exp(lse - higher))
        out = base * tl.exp(other - merged)[:, None] + acc * (tl.exp(lse - merged) / total)[:, None]
        lse = merged
    tl.store(lse_ptr, lse, mask=l < L)
    _store_rows(out_ptr + b * stride_ob + h * stride_oh, out, l, L, D, stride_ol, BLOCK_D)


@triton.jit
def _prompt_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, in_ptr, lse_ptr, delta_ptr, gate_ptr, dq_ptr, L, D, P, H, groups, scale,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_yb, stride_yh, stride_yl, stride_ib, stride_ih, stride_il, stride_db, stride_dh, stride_dl,
    GATED: tl.constexpr, HAS_DQ: tl.constexpr, ADD_DQ: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta of a tile of queries, sum(dY * out) or with a gate sum(P * dP); the prompt's part of dq, or dq with it."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, l, L, D, stride_ql, BLOCK_D)
    dy = _load_rows(dy_ptr + b * stride_yb + h * stride_yh, l, L, D, stride_yl, BLOCK_D)
    k_ptr += b * stride_kb + h // groups * stride_kh
    v_ptr += b * stride_vb + h // groups * stride_vh
    row = (b * H + h) * L + l
    lse = tl.load(lse_ptr + row, mask=l < L, other=0.0)
    zeros = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + h)
        delta = tl.zeros([BLOCK_L], tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            k = _load_rows(k_ptr, p, P, D, stride_kl, BLOCK_D)
            weight = tl.exp(_scores(q, k, p, P, scale, PIECES, BLOCK_L, BLOCK_P) - lse[:, None])
            v = _load_rows(v_ptr, p, P, D, stride_vl, BLOCK_D)
            delta += tl.sum(weight * dot_wide(dy, tl.trans(v), zeros, PIECES), 1)
    else:
        gate = 1.0
        out = _load_rows(in_ptr + b * stride_ib + h * stride_ih, l, L, D, stride_il, BLOCK_D)
        delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=l < L)
    if HAS_DQ:
        dq = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            k = _load_rows(k_ptr, p, P, D, stride_kl, BLOCK_D)
            weight = tl.exp(_scores(q, k, p, P, scale, PIECES, BLOCK_L, BLOCK_P) - lse[:, None])
            v = _load_rows(v_ptr, p, P, D, stride_vl, BLOCK_D)
            dp = dot_wide(dy, tl.trans(v), zeros, PIECES)
            ds = weight * (dp - delta[:, None]) * (scale * gate)
            dq = dot_wide(ds.to(q.dtype), k, dq, PIECES)
        dq_ptr += b * stride_db + h * stride_dh
        if ADD_DQ:
            dq += _load_rows(dq_ptr, l, L, D, stride_dl, BLOCK_D).to(tl.float32)
        _store_rows(dq_ptr, dq, l, L, D, stride_dl, BLOCK_D)


@triton.jit(do_not_specialize=["steps", "per_split"])  # they differ from batch to batch
def _prompt_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, gate_ptr, dkv_ptr,
    L, D, P, H, groups, steps, per_split, scale,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_yb, stride_yh, stride_yl,
    GATED: tl.constexpr, PER_SAMPLE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dkv[split] (2, heads, P, D) of a tile of the prompt, over the split's tiles of queries."""
    head, split = tl.program_id(1), tl.program_id(2)
    kv_heads = H // groups
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    own, kv_head = (head // kv_heads).to(tl.int64), head % kv_heads
    k = _load_rows(k_ptr + own * stride_kb + kv_head * stride_kh, p, P, D, stride_kl, BLOCK_D)
    v = _load_rows(v_ptr + own * stride_vb + kv_head * stride_vh, p, P, D, stride_vl, BLOCK_D)
    dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_P, BLOCK_L], tl.float32)
    tiles = tl.cdiv(L, BLOCK_L)
    for step in range(split * per_split, tl.minimum(steps, (split + 1) * per_split)):
        l = step % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
        h = kv_head * groups + step // tiles % groups
        b = (step // (tiles * groups)).to(tl.int64)
        if PER_SAMPLE:
            b = own
        q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, l, L, D, stride_ql, BLOCK_D)
        dy = _load_rows(dy_ptr + b * stride_yb + h * stride_yh, l, L, D, stride_yl, BLOCK_D)
        row = (b * H + h) * L + l
        lse = tl.load(lse_ptr + row, mask=l < L, other=0.0)
        delta = tl.load(delta_ptr + row, mask=l < L, other=0.0)
        gate = tl.load(gate_ptr + h) if GATED else 1.0
        # rows of q and dY past L are zero: whatever their weights are, they add nothing
        weight = tl.exp(dot_wide(k, tl.trans(q), zeros, PIECES) * scale - lse[None, :])
        dv = dot_wide((weight * gate).to(q.dtype), dy, dv, PIECES)
        ds = weight * (dot_wide(v, tl.trans(dy), zeros, PIECES) - delta[None, :]) * (scale * gate)
        dk = dot_wide(ds.to(q.dtype), q, dk, PIECES)
    _store_dkv(dkv_ptr, dk, dv, split, head, tl.num_programs(1), p, P, D, BLOCK_D)


@triton.jit(do_not_specialize=["steps", "per_split"])  # they differ from batch to batch
def _prompt_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, in_ptr, lse_ptr, delta_ptr, gate_ptr, dq_ptr, dkv_ptr,
    L, D, P, H, groups, steps, per_split, scale,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_yb, stride_yh, stride_yl, stride_ib, stride_ih, stride_il, stride_db, stride_dh, stride_dl,
    GATED: tl.constexpr, HAS_DQ: tl.constexpr, ADD_DQ: tl.constexpr, PER_SAMPLE: tl.constexpr,
    PIECES: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The two kernels above in one, for a prompt of one tile: q and dY are read once, delta stored for a gate only."""
    head, split = tl.program_id(1), tl.program_id(2)
    kv_heads = H // groups
    own, kv_head = (head // kv_heads).to(tl.int64), head % kv_heads
    p = tl.arange(0, BLOCK_P)
    k = _load_rows(k_ptr + own * stride_kb + kv_head * stride_kh, p, P, D, stride_kl, BLOCK_D)
    v = _load_rows(v_ptr + own * stride_vb + kv_head * stride_vh, p, P, D, stride_vl, BLOCK_D)
    dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    tiles = tl.cdiv(L, BLOCK_L)
    for step in tl.range(split * per_split, tl.minimum(steps, (split + 1) * per_split), num_stages=STAGES):
        l = step % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
        h = kv_head * groups + step // tiles % groups
        b = (step // (tiles * groups)).to(tl.int64)
        if PER_SAMPLE:
            b = own
        dy = _load_rows(dy_ptr + b * stride_yb + h * stride_yh, l, L, D, stride_yl, BLOCK_D)
        row = (b * H + h) * L + l
        if not GATED:
            gate = 1.0
            out = _load_rows(in_ptr + b * stride_ib + h * stride_ih, l, L, D, stride_il, BLOCK_D)
            delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
        q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, l, L, D, stride_ql, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=l < L, other=0.0)
        weight = tl.exp(_scores(q, k, p, P, scale, PIECES, BLOCK_L, BLOCK_P) - lse[:, None])
        dp = dot_wide(dy, tl.trans(v), zeros, PIECES)
        if GATED:
            gate = tl.load(gate_ptr + h)
            delta = tl.sum(weight * dp, 1)
            tl.store(delta_ptr + row, delta, mask=l < L)
        # rows of q and dY past L are zero: whatever their weights are, they add nothing
        ds = (weight * (dp - delta[:, None]) * (scale * gate)).to(q.dtype)
        dv = dot_wide(tl.trans((weight * gate).to(q.dtype)), dy, dv, PIECES)
        dk = dot_wide(tl.trans(ds), q, dk, PIECES)
        if HAS_DQ:
            dq = dot_wide(ds, k, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PIECES)
            to = dq_ptr + b * stride_db + h * stride_dh
            if ADD_DQ:
                dq += _load_rows(to, l, L, D, stride_dl, BLOCK_D).to(tl.float32)
            _store_rows(to, dq, l, L, D, stride_dl, BLOCK_D)
    _store_dkv(dkv_ptr, dk, dv, split, head, tl.num_programs(1), p, P, D, BLOCK_D)
