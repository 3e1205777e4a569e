"""PrefixAttention: a trained prefix and the attention over it."""

from __future__ import annotations

import torch
from torch import nn

from ...checks import check_virtual_tokens
from .op import prefix_attention


class PrefixAttention(nn.Module):
    """Attention over [prefix; keys]; see `peft_kernels.functional.prefix_attention`.

    Args:
        num_kv_heads: Hkv. num_virtual_tokens: P. head_dim: D. The trained prefix_k and prefix_v are (Hkv, P, D), drawn
            from a normal distribution of standard deviation `init_std`.
    """

    def __init__(
        self,
        num_kv_heads: int,
        num_virtual_tokens: int,
        head_dim: int,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_virtual_tokens(num_virtual_tokens)
        shape = (num_kv_heads, num_virtual_tokens, head_dim)
        self.prefix_k = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.prefix_v = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prefix anew."""
        nn.init.normal_(self.prefix_k, std=self.init_std)
        nn.init.normal_(self.prefix_v, std=self.init_std)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """q (B, H, L, D), k and v (B, Hkv, S, D) -> (B, H, L, D)."""
        return prefix_attention(
            q, k, v, self.prefix_k, self.prefix_v, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        heads, length, width = self.prefix_k.shape
        return f"num_kv_heads={heads}, num_virtual_tokens={length}, head_dim={width}"
