"""The dropout mask as a function of (seed, row, column): the definition that every backend regenerates.

Element (m, k) looks at word k % 4 of Philox4x32-10 with counter (k // 4, m, 0, 0) and key (seed low, seed high), and is
kept iff that word is at least p * 2**32. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_seeds(dropout_p: list[float], device: torch.device) -> torch.Tensor | None:
    """One int64 seed per adapter from torch's generator of `device`, or None when nothing is dropped."""
    if not any(p > 0 for p in dropout_p):
        return None
    return torch.randint(-(2**63), 2**63 - 1, (len(dropout_p),), dtype=torch.int64, device=device)


def scale_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """The mask as factors: (rows, columns) float64, 0 where dropped, 1 / (1 - p) where kept (pure torch)."""
    device = seed.device
    k = torch.arange((columns + 3) // 4, device=device, dtype=torch.int64).expand(rows, -1)
    m = torch.arange(rows, device=device, dtype=torch.int64)[:, None].expand_as(k)
    counter = [k, m, torch.zeros_like(k), torch.zeros_like(k)]
    words = _philox(counter, [seed & _MASK32, (seed >> 32) & _MASK32])
    row_major = torch.stack(words, dim=-1).reshape(rows, -1)[:, :columns]
    keep = row_major >= int(p * 2**32)
    return keep.to(torch.float64) / (1 - p if p < 1 else 1)


def _philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product (int64 wraps, its bits stay right)."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32
