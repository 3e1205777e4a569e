"""The vendor's products on a CPU, x W^T and dy W, over a dense weight or a 4-bit one that is decoded first.

Where a processor has no instructions for x's half precision, torch widens, multiplies and rounds by itself, several
times more slowly than its float32 product runs; there the operands are widened here, the weight a panel at a time:
a dense one, and a 4-bit one that the fused kernels do not serve (without AVX2, or with blocks across rows).
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F

from ... import native
from ...weight4bit import Weight4bit
from ..nf4.native_calls import dequantize

# Two cores of a Skylake server, torch's time / ours in bfloat16, forward and dX. 4096 x 4096 of 4 bits: 8 rows 1.06 and
# 0.88, 16 rows 1.26 and 1.18, 64 rows 1.9 and 1.8, 1024 rows 3.3 and 3.9; dense 576 x 576: 8 rows 0.66 and 0.75, 16
# rows 1.31 and 0.87, 64 rows 1.6 and 2.0, 1024 rows 4.0 and 3.8. Of float16 forward 0.93 to 1.28, 1.7 to 2.5, 5, 9; its
# dX takes torch 18 times as long as us from one row on.
_MIN_ROWS = 16
_PANEL_BYTES = 8 << 20  # of a widened weight, which stays in the last-level cache: 4.6 ms for 4096 x 4096, of 16 MiB 6
_ROWS = 512  # of x or dy that are widened at a time
_FEW_ROWS = 128  # up to here W x^T is faster than x W^T (at 16 rows 4.6 ms, not 10); beyond, turning it over costs more

_buffers = threading.local()


def linear(x: torch.Tensor, weight: torch.Tensor | Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K), M >= 1 -> x W^T + b (M, N)."""
    if not widens(x.dtype, x.shape[0]):
        return F.linear(x, decoded(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    y = x.new_empty((x.shape[0], weight.shape[0]))
    for row in range(0, x.shape[0], _ROWS):
        rows = _filled("rows", x[row : row + _ROWS])
        for first, last in _panels(weight):
            panel = _panel(weight, first, last, x.dtype)
            if rows.shape[0] <= _FEW_ROWS:
                sums = torch.mm(panel, rows.t(), out=_buffer("sums", (last - first, rows.shape[0]))).t()
            else:
                sums = torch.mm(rows, panel.t(), out=_buffer("sums", (rows.shape[0], last - first)))
            y[row : row + _ROWS, first:last] = sums if bias is None else sums.add_(bias[first:last])
    return y


def product(dy: torch.Tensor, weight: torch.Tensor | Weight4bit) -> torch.Tensor:
    """dy (M, N), M >= 1 -> dy W (M, K)."""
    if not widens(dy.dtype, dy.shape[0], backward=True):
        return dy @ decoded(weight, dy.dtype)
    dx = dy.new_empty((dy.shape[0], weight.shape[1]))
    for row in range(0, dy.shape[0], _ROWS):
        part = dy[row : row + _ROWS]
        sums = _buffer("sums", (part.shape[0], weight.shape[1])).zero_()
        for first, last in _panels(weight):
            sums.addmm_(_filled("rows", part[:, first:last]), _panel(weight, first, last, dy.dtype))
        dx[row : row + _ROWS] = sums
    return dx


def widens(dtype: torch.dtype, rows: int, *, backward: bool = False) -> bool:
    """Whether a product of so many rows is computed in float32."""
    if native.multiplies(dtype):
        return False
    return rows >= _MIN_ROWS or (backward and dtype is torch.float16)


def decoded(weight: torch.Tensor | Weight4bit, dtype: torch.dtype) -> torch.Tensor:
    """W; a 4-bit one in a scratch that the thread's next call overwrites: fresh pages would cost more than decoding."""
    if not isinstance(weight, Weight4bit):
        return weight
    return dequantize(weight, dtype, out=_buffer("weight", weight.shape, dtype))


def _panels(weight: torch.Tensor | Weight4bit) -> list[tuple[int, int]]:
    """Rows of W, from and to, whose widened form is kept in the cache."""
    n, k = weight.shape
    step = max(1, _PANEL_BYTES // (4 * max(k, 1)))
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def _panel(weight: torch.Tensor | Weight4bit, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W, as they are in dtype, in float32."""
    if isinstance(weight, Weight4bit):
        rows = dequantize(weight, dtype, (first, last), _buffer("weight", (last - first, weight.shape[1]), dtype))
    else:
        rows = weight[first:last]
    return _filled("panel", rows)


def _filled(name: str, t: torch.Tensor) -> torch.Tensor:
    """A float32 copy of t in a scratch."""
    return _buffer(name, t.shape).copy_(t)


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scratch that the thread's next call with this name and dtype overwrites."""
    buffers: dict[Any, torch.Tensor] = _buffers.__dict__
    numel, key = shape[0] * shape[1], (name, dtype)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            buffers[key] = buffer = torch.empty(numel, dtype=dtype)
    return buffer[:numel].view(shape)
