"""GatedPromptAttention: LLaMA-Adapter's zero-init attention."""

from __future__ import annotations

import torch
from torch import nn

from ...checks import bad_value, check_virtual_tokens
from .op import gated_prompt_attention


class GatedPromptAttention(nn.Module):
    """Attention plus a gated attention over a trained prompt; `peft_kernels.functional.gated_prompt_attention`.

    Args:
        num_heads: H. num_virtual_tokens: P. head_dim: D. num_kv_heads: Hkv, by default H. The trained prompt_k and
            prompt_v are (Hkv, P, D), drawn from a normal distribution of standard deviation `init_std`.
        gate_activation: "tanh", as in the paper: the gate is bounded by 1; or None, as in Hugging Face PEFT, whose gate
            is the factor itself. At the zero that both start from they agree, gradient included.
        gate_per_head: one gate for each head (the paper), or one for all (PEFT).

    Source: LLaMA-Adapter, arXiv:2303.16199, section 3.2; its visual prompts, section 3.3.
    """

    def __init__(
        self,
        num_heads: int,
        num_virtual_tokens: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        gate_activation: str | None = "tanh",
        gate_per_head: bool = True,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if gate_activation not in ("tanh", None):
            raise bad_value(
                "gate_activation", "'tanh' or None", repr(gate_activation), "None leaves the gate as it is."
            )
        check_virtual_tokens(num_virtual_tokens)
        if num_kv_heads and num_heads % num_kv_heads:
            raise bad_value("num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads, "See the model's.")
        shape = (num_kv_heads or num_heads, num_virtual_tokens, head_dim)
        self.prompt_k = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.prompt_v = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(num_heads if gate_per_head else 1, device=device, dtype=dtype))
        self.gate_activation, self.init_std = gate_activation, init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompt anew and close the gate: the base model's attention, bit for bit."""
        nn.init.normal_(self.prompt_k, std=self.init_std)
        nn.init.normal_(self.prompt_v, std=self.init_std)
        nn.init.zeros_(self.gate)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        sample_k: torch.Tensor | None = None,
        sample_v: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """q (B, H, L, D), k and v (B, Hkv, S, D) -> (B, H, L, D).

        sample_k, sample_v: (B, Hkv, P or 1, D) or None, for example projected image features: each sample's own
        addition to the trained prompt, with a gradient of its own.
        """
        prompt_k = self.prompt_k if sample_k is None else self.prompt_k + sample_k
        prompt_v = self.prompt_v if sample_v is None else self.prompt_v + sample_v
        if prompt_k.ndim != prompt_v.ndim:  # only one of them was given for each sample
            prompt_k, prompt_v = torch.broadcast_tensors(prompt_k, prompt_v)
        gate = self.gate.tanh() if self.gate_activation == "tanh" else self.gate
        return gated_prompt_attention(
            q, k, v, prompt_k, prompt_v, gate, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        heads, length, width = self.prompt_k.shape
        return f"num_kv_heads={heads}, num_virtual_tokens={length}, head_dim={width}, gate={self.gate_activation}"
