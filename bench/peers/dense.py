"""Floors: the vendor's dense matrix product, and a streaming read of memory (on a GPU: a copy)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

NAME, STREAM = "dense", "streaming read"
STREAM_BYTES = 256 << 20
READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32 sum": torch.sum,
    "float32 norm": torch.linalg.vector_norm,
    "float32 amax": torch.amax,
    "int32 amax": lambda chunk: chunk.view(torch.int32).amax(),
    "bfloat16 amax": lambda chunk: chunk.view(torch.bfloat16).amax(),
    "float32 gemv": lambda chunk: torch.mv(chunk[: chunk.numel() // 4096 * 4096].view(-1, 4096), _ones(4096)),
}


@functools.cache
def _ones(n: int) -> torch.Tensor:
    return torch.ones(n)


def stream(nbytes: int, device: torch.device) -> tuple[list[Callable[[], torch.Tensor]], str]:
    """Calls that each move `nbytes` of a buffer beyond any cache, by the fastest way found here; and its name."""
    if device.type != "cpu":  # half is read and half is written
        source, target = torch.ones(2, max(1, nbytes // 8), device=device).unbind()
        return [lambda: target.copy_(source)], "copy"
    chunks = list(torch.ones(STREAM_BYTES // 4).split(nbytes // 4))
    chunks = chunks[:-1] if len(chunks) > 1 else chunks

    def seconds(reader: Callable[[torch.Tensor], torch.Tensor]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for chunk in chunks:
                reader(chunk)
            best = min(best, time.perf_counter() - start)
        return best

    name = min(READERS, key=lambda name: seconds(READERS[name]))
    return [functools.partial(READERS[name], chunk) for chunk in chunks], name
