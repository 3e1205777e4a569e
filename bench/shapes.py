"""Model shapes by name, from the models' published configurations, and the linear layers of one of their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

RANK = 16


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder-only transformer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Layer -> (out_features, in_features), each distinct shape of a block once."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q": (queries, self.hidden),
            "k, v": (keys, self.hidden),
            "o": (self.hidden, queries),
            "gate, up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }
        if shapes["q"] == shapes["o"]:
            shapes = {"q, o": shapes.pop("q")} | {name: shape for name, shape in shapes.items() if name != "o"}
        return shapes


MODELS: dict[str, Model] = {
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 30, 49152),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64, 16, 128256),
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128, 32, 128256),
    "qwen3-8b": Model(4096, 12288, 32, 8, 128, 36, 151936),
    "mistral-7b": Model(4096, 14336, 32, 8, 128, 32, 32768),
}
# Sets of layers: the square one carries the CPU goals, the small one serves quick runs.
SETS: dict[str, dict[str, tuple[int, int]]] = {
    "square-4096": {"": (4096, 4096)},
    "quick": {"": (192, 576)},
} | {name: model.linears() for name, model in MODELS.items()}


@dataclass(frozen=True)
class Layer:
    """A linear layer of a set: W (n, k)."""

    set: str
    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.set} {self.name} {self.n}x{self.k}" if self.name else f"{self.n}x{self.k}"


def layers(sets: Iterable[str]) -> Iterator[Layer]:
    """Every layer of the named sets."""
    for name in sets:
        for layer, (n, k) in SETS[name].items():
            yield Layer(name, layer, n, k)
