"""Bottlenecks too wide for one program: GEMMs by the vendor, dropout and scaling in the low-rank kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...triton_common.lowrank import LowRank, expand_add
from ..lora_linear.triton_adapter import shrink
from .activations import ACTIVATIONS


def hidden_bias(down, down_bias, ln_bias):
    """What z is where the normalized x is zero: Wd ln_bias + bd (r,), float32."""
    total = torch.zeros(down.shape[0], device=down.device) if down_bias is None else down_bias.float()
    return total if ln_bias is None else total + (down.float() * ln_bias.float()).sum(1)


def forward(x, added, down, up, vectors, activation, scaling, ln_eps, dropout_p, seed):
    """y (M, N), z (M, r), stats (2, M) or empty."""
    down_bias, up_bias, ln_weight, ln_bias, channel, gate = vectors
    h, stats = x, torch.empty(0, device=x.device)
    if ln_weight is not None:
        bias = None if ln_bias is None else ln_bias.float()
        h, mean, inverse_std = torch.native_layer_norm(x.float(), x.shape[1:], ln_weight.float(), bias, ln_eps)
        stats = torch.stack((mean.flatten(), inverse_std.flatten()))
    z = F.linear(h.to(down.dtype), down, None if down_bias is None else down_bias.to(down.dtype))
    left, right = ACTIVATIONS[activation](z.float()), _scaled_up(up, channel)
    if up_bias is not None:  # one more column, scaled and dropped like the product; rows stay aligned
        rank, bias = up.shape[1], up_bias.float() if channel is None else up_bias.float() * channel.float()
        padding = (0, 16 - rank % 16)
        left, right = F.pad(left, padding), F.pad(right.float(), padding)
        left[:, rank], right[:, rank] = 1.0, bias
    if gate is not None:
        left = left * gate.float()[:, None]
    shape = x.shape[0], up.shape[0]
    if added is None:
        y = torch.zeros(shape, dtype=x.dtype, device=x.device)
    else:
        y = added.to(torch.promote_types(x.dtype, added.dtype), memory_format=torch.contiguous_format, copy=True)
    expand_add(y, LowRank(left, right.t(), scaling, dropout_p, seed))
    return y, z, stats


def rows(dy, x, z, stats, down, up, vectors, add_x, activation, scaling, dropout_p, seed, x_dtype, needs):
    """dx, dz and gate act(z) (M, r) float32, dgate (M,) float32; None where not needed."""
    down_bias, up_bias, ln_weight, ln_bias, channel, gate = vectors
    right = _scaled_up(up, channel)
    if needs[8] and up_bias is not None:
        bias = up_bias.float() if channel is None else up_bias.float() * channel.float()
        right = torch.cat((right.float(), bias[:, None]), 1)
    sums = shrink(dy, right.to(up.dtype).t(), dropout_p, seed) * scaling
    dh, bias_dot = sums[:, : up.shape[1]], sums[:, up.shape[1] :].sum(1)
    with torch.enable_grad():
        leaf = z.float().detach().requires_grad_()
        value = ACTIVATIONS[activation](leaf)
        (dz,) = torch.autograd.grad(value, leaf, dh)
    hidden = value.detach()
    dgate = (hidden * dh).sum(1) + bias_dot if needs[8] else None
    if gate is not None:
        dz, hidden = dz * gate.float()[:, None], hidden * gate.float()[:, None]
    if not needs[0]:
        return None, dz, hidden, dgate
    dx = (dz.to(down.dtype) @ down).float()
    if stats is not None:
        k = down.shape[1]
        mean, inverse_std = stats[:, :, None]
        c1 = (dz * (down.float() * ln_weight.float()).sum(1)).sum(1, keepdim=True) / k
        c2 = (dz * (z.float() - hidden_bias(down, down_bias, ln_bias))).sum(1, keepdim=True) / k
        dx = (dx * ln_weight.float() - c1 - (x.float() - mean) * inverse_std * c2) * inverse_std
    return (dx + dy if add_x else dx).to(x_dtype), dz, hidden, dgate


def _scaled_up(up, channel):
    """Wu with the factor of every output channel."""
    return up if channel is None else up.float() * channel.float()[:, None]
