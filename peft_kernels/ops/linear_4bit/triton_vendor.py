"""Many rows: the weight is decoded into a scratch, whole or a panel at a time, and multiplied by the vendor's GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...weight4bit import Weight4bit
from ..nf4.triton_kernels import dequantize

# The most bytes of a decoded weight at a time, for memory's sake: a vocabulary's projection is larger. Panels so small
# that they reach the GEMM through the L2 cache are no faster (measured on H100, 8192 rows).
_MOST_BYTES = 256 << 20


def vendor_forward(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """y (M, N) = x W^T + b; or `onto` (M, N), which is added to in the GEMM's own accumulator and returned."""
    n, k = weight.shape
    y = x.new_empty((x.shape[0], n)) if onto is None else onto
    for rows in panels(n, k, 4096 if k % weight.blocksize else 1, x.dtype):
        w = decode(weight, x.dtype, rows=rows).t()
        multiply(x, w, None if bias is None else bias[rows], y[:, rows], onto is not None)
    return y


def vendor_backward(dy: torch.Tensor, weight: Weight4bit, onto: torch.Tensor | None = None) -> torch.Tensor:
    """dx (M, K) = dy W; or `onto` (M, K), as in `vendor_forward`.

    A panel is columns of W, so that each part of dx is one product, accumulated in float32 and rounded once.
    """
    n, k = weight.shape
    dx = dy.new_empty((dy.shape[0], k)) if onto is None else onto
    for columns in [slice(0, k)] if k % weight.blocksize else panels(k, n, weight.blocksize, dy.dtype):
        multiply(dy, decode(weight, dy.dtype, columns=columns), None, dx[:, columns], onto is not None)
    return dx


def multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, add: bool) -> None:
    """out (M, N) = x w + bias, or += x w; `out` may be columns of a larger tensor."""
    if add:
        out.addmm_(x, w)
    elif bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, w, out=out)


def panels(size: int, other: int, whole: int, dtype: torch.dtype) -> Iterator[slice]:
    """The parts of a decoded weight's `size` rows (or columns) of `other` elements, each a multiple of `whole`."""
    step = max(1, _MOST_BYTES // (other * dtype.itemsize) // whole) * whole
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


_scratch: dict[tuple[torch.device, int, torch.dtype], torch.Tensor] = {}


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer that the next call on the same stream overwrites.

    While a graph is captured it is a fresh tensor: a replay must not meet other calls in the scratch.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, numel = (device, stream, dtype), shape[0] * shape[1]
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
