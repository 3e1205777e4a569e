"""Named layer shapes: the linear layers of one transformer block, (out_features, in_features)."""

from __future__ import annotations

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "cpu-bar": {"square": (4096, 4096)},  # the shape that the CPU goals are set on
    "smollm2-135m": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    "llama-3.2-1b": {"q, o": (2048, 2048), "k, v": (512, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
    "llama-3.1-8b": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
}
QUICK = {"smollm2-135m": {"k, v": (192, 576)}}
RANK = 16
