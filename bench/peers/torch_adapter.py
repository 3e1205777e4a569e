"""A bottleneck adapter of torch's own modules, as one writes it by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAME = "torch modules"


class Adapter(torch.nn.Module):
    """x + scaling * up(relu(down([norm](x)))), where x is (..., k) and the hidden (..., r)."""

    def __init__(self, k: int, r: int, *, norm: bool = False, scaling: float = 1.0):
        super().__init__()
        self.norm = torch.nn.LayerNorm(k) if norm else torch.nn.Identity()
        self.down, self.up = torch.nn.Linear(k, r), torch.nn.Linear(r, k)
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) -> (..., k)."""
        return x + self.up(F.relu(self.down(self.norm(x)))) * self.scaling
