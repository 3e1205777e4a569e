"""Many rows: the weight is decoded into a scratch, whole or a panel at a time, and multiplied by the vendor's GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...triton_common.launch import Target, cdiv, target
from ...weight4bit import Weight4bit
from ..nf4.triton_kernels import dequantize

# The most bytes of a decoded weight at a time, for memory's sake: a vocabulary's projection is larger.
_MOST_BYTES = 256 << 20
# Targets on which a weight is decoded a panel at a time even below that, and the rows of x from which on: a panel of at
# most half the L2 cache reaches the GEMM without a way through memory, and the scratch shrinks with it (14336 x 4096 on
# H100: 25 of 117 MB). Predicted by `bench/model_training.py`, not measured: within 1 % of a whole decode's time from
# 4096 rows on, slower below, where the launches weigh. B200 and MI300X have a cache for the whole weight.
_L2_PANELS: dict[tuple[str, int | str], int] = {("cuda", 80): 4096, ("cuda", 90): 4096}
# The tile of the result that vendors' GEMMs prefer: what the programs of a panel have to fill multiprocessors with.
_TILE_M, _TILE_N = 128, 256


def vendor_forward(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """y (M, N) = x W^T + b; or `onto` (M, N), which is added to in the GEMM's own accumulator and returned."""
    n, k = weight.shape
    y = x.new_empty((x.shape[0], n)) if onto is None else onto
    for rows in panels(n, k, 4096 if k % weight.blocksize else 1, x):
        w = decode(weight, x.dtype, rows=rows).t()
        multiply(x, w, None if bias is None else bias[rows], y[:, rows], onto is not None)
    return y


def vendor_backward(dy: torch.Tensor, weight: Weight4bit, onto: torch.Tensor | None = None) -> torch.Tensor:
    """dx (M, K) = dy W; or `onto` (M, K), as in `vendor_forward`.

    A panel is columns of W, so that each part of dx is one product, accumulated in float32 and rounded once.
    """
    n, k = weight.shape
    dx = dy.new_empty((dy.shape[0], k)) if onto is None else onto
    for columns in [slice(0, k)] if k % weight.blocksize else panels(k, n, weight.blocksize, dy):
        multiply(dy, decode(weight, dy.dtype, columns=columns), None, dx[:, columns], onto is not None)
    return dx


def longer_forward(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """y (M, N) = [x's first K columns] W^T + [the others] more^T + b, in one product of x (M, K + P), more (N, P)."""
    n, k = weight.shape
    y = x.new_empty((x.shape[0], n))
    for rows in panels(n, x.shape[1], 1, x):
        w = scratch((rows.stop - rows.start, x.shape[1]), x.dtype, x.device)
        dequantize(weight, x.dtype, w[:, :k], rows)
        w[:, k:] = more[rows]
        multiply(x, w.t(), None if bias is None else bias[rows], y[:, rows], False)
    return y


def multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool) -> None:
    """out (M, N) = x w + bias, or += x w; `out` may be columns of a larger tensor."""
    if add:
        out.addmm_(x, w)
    elif bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, w, out=out)


def panels(size: int, other: int, whole: int, x: torch.Tensor) -> Iterator[slice]:
    """The parts of a decoded weight's `size` rows (or columns) of `other` elements, each a multiple of `whole`."""
    unit = other * x.element_size()
    step = max(1, min(_l2_step(size, unit, x.shape[0], target(x.device)), _MOST_BYTES // unit) // whole) * whole
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def _l2_step(size: int, unit: int, m: int, on: Target) -> int:
    """Rows of W, of `unit` bytes each, that stay in L2; all of them where that would fill the multiprocessors less."""

    def filled(rows: int) -> float:
        tiles = cdiv(m, _TILE_M) * cdiv(rows, _TILE_N)
        return tiles / (cdiv(tiles, on.multiprocessors) * on.multiprocessors)

    if m < _L2_PANELS.get((on.kind, on.arch), m + 1):
        return size
    # x and y pass through the other half
    steps = range(_TILE_N, min(on.l2 // 2 // unit, size) + 1, _TILE_N)
    return max((rows for rows in steps if filled(rows) >= filled(size)), default=size)


_scratch: dict[tuple[str, torch.device, int, torch.dtype], torch.Tensor] = {}


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, use: str = "weight") -> torch.Tensor:
    """A buffer that the next call for the same use on the same stream overwrites.

    While a graph is captured it is a fresh tensor: a replay must not meet other calls in the scratch.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, numel = (use, device, stream, dtype), shape[0] * shape[1]
    buffer = _scratch.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def decode(
    weight: Weight4bit, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)
) -> torch.Tensor:
    """W or a window of it, in the scratch."""
    n, k = (len(range(size)[window]) for size, window in zip(weight.shape, (rows, columns), strict=True))
    return dequantize(weight, dtype, scratch((n, k), dtype, weight.packed.device), rows, columns)
