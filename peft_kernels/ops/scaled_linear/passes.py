"""The backward pass around a backend's product dY W and its pass over columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def backward(
    columns: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]],
    product: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    product_scales: bool,
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """dx (M, K), column sums of dy (N,), gradient of the scale; the last two float32. None for what is not needed.

    columns(u, times, scale, out, sums): one pass over u; out = u * scale, and the column sums of u and of u * times.
    product(dy, scale): (dy * scale) W, where `product_scales`; else it takes no scale.
    saved: x for a feed-forward layer, else the unscaled output; read for the gradient of the scale alone.
    """
    need_dx, need_sums, need_dscale = needs
    times = saved if need_dscale else None
    if is_feedforward:
        sums, _ = columns(dy, sums=need_sums)
        if not (need_dx or need_dscale):
            return None, sums, None
        dx = product(dy, None)
        _, dscale = columns(dx, times=times, scale=scale, out=dx if need_dx else None)
        return dx if need_dx else None, sums, dscale
    scaled: Any = None
    if scale is not None and need_dx and not product_scales:
        scaled = torch.empty_like(dy, memory_format=torch.contiguous_format)
    sums, dscale = columns(dy, times=times, scale=scale, out=scaled, sums=need_sums)
    if not need_dx:
        return None, sums, dscale
    return product(dy, scale) if scaled is None else product(scaled, None), sums, dscale
