"""Attention over a learned prefix, trained and decoding, and the gated attention over a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk

from ..case import FUNCTIONAL, Case, Goal, Options, Training, Work, checked, dtype_name, without_grad

CONCATENATED, TWICE, PLAIN = "repeat + concatenate", "two attentions", "plain attention"

# B, H, Hkv, L, D, P -> least peer time / our time on 2 cores with AVX512-BF16
PREFIX = {
    (4, 32, 32, 512, 128, 32): 1.1,
    (4, 32, 32, 64, 128, 128): 1.5,
    (1, 32, 8, 512, 128, 32): 1.1,
}
# The prefix costs what it moves, the keys cost the square of L: on a GPU the goal takes long sequences.
LONG = ((1, 32, 8, 2048, 128, 32), (1, 32, 8, 4096, 128, 32))
DECODING = ((1, 32, 32, 512, 128, 32), (1, 32, 8, 2048, 128, 32), (8, 32, 8, 512, 128, 32))
GATED = ((1, 32, 32, 512, 128, 10),)
QUICK = ((2, 4, 2, 33, 32, 5),)
NAMES = ("q", "k", "v", "prompt_k", "prompt_v", "gate")


def cases(options: Options) -> Iterator[Case]:
    """Prefix attention, forward and backward and decoding one token; gated prompt attention, forward and backward."""
    judged = options.device.type == "cpu" and not options.quick
    long = LONG if options.device.type != "cpu" else ()
    for sizes in QUICK if options.quick else (*PREFIX, *long):
        goals = (Goal(CONCATENATED, FUNCTIONAL, at_least=PREFIX[sizes]),) if judged else ()
        if not options.quick and sizes[5] == 32:
            goals += (Goal(FUNCTIONAL, PLAIN, at_most=1.1),)
        yield case(options, "prefix", "forward + backward", sizes, prefix, goals)
    for sizes in QUICK if options.quick else DECODING:
        goals = (Goal(CONCATENATED, FUNCTIONAL, at_least=1.0),) if judged else ()
        yield case(options, "prefix", "decode one token", sizes, decoding, goals)
    for sizes in QUICK if options.quick else GATED:
        goals = (Goal(FUNCTIONAL, PLAIN, at_most=1.1),) if judged else ()
        yield case(options, "gated prompt", "forward + backward", sizes, gated, goals)


def case(
    options: Options, what: str, op: str, sizes: tuple[int, ...], work: Callable[..., Work], goals: tuple[Goal, ...]
) -> Case:
    """One row."""
    facts: dict[str, Any] = dict(zip(("B", "H", "Hkv", "L", "D", "P"), sizes, strict=True))
    facts["dtype"] = dtype_name(options.dtype)
    name = f"{what}, " + " ".join(f"{key}={size}" for key, size in list(facts.items())[:-1])
    return Case(name, op, facts, partial(work, options, *sizes), goals)


def concatenated(q: Any, k: Any, v: Any, prompt_k: Any, prompt_v: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The usual way: the prefix repeated over the batch and put before the keys, under a mask that shows all of it."""
    batch = q.shape[0]
    k, v = (torch.cat([p.repeat(batch, 1, 1, 1), t], dim=2) for p, t in ((prompt_k, k), (prompt_v, v)))
    if q.is_cuda and q.shape[1] != k.shape[1]:  # under a mask torch has no fast kernel there for grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The floor: attention over the keys alone."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])


def inputs(options: Options, b: int, h: int, hkv: int, length: int, d: int, p: int) -> tuple[list[Any], torch.Tensor]:
    """q, k, v as a model's projections leave them, prompts, a gate for each head, and dY."""
    torch.manual_seed(0)
    heads = [options.randn(b, length, n, d).transpose(1, 2).requires_grad_() for n in (h, hkv, hkv)]
    prompts = [options.randn(hkv, p, d, grad=True) for _ in range(2)]
    return [*heads, *prompts, options.randn(h, grad=True)], options.randn(b, length, h, d).transpose(1, 2)


def training(function: Callable[..., torch.Tensor], tensors: list[Any], dy: torch.Tensor) -> Training:
    """function(*tensors), and the gradient of each of them."""
    leaves = {f"d{name}": t for name, t in zip(NAMES, tensors, strict=False)}
    return Training(lambda: function(*tensors), leaves, dy)


def exact(tensors: list[Any]) -> list[Any]:
    """The same leaves in float64."""
    return [t.detach().double().requires_grad_() for t in tensors]


def prefix(options: Options, b: int, h: int, hkv: int, length: int, d: int, p: int) -> Work:
    """Forward and backward, causal; all five gradients are computed."""
    tensors, dy = inputs(options, b, h, hkv, length, d, p)
    tensors = tensors[:5]
    mask = torch.ones(length, p + length, dtype=torch.bool, device=options.device).tril(p)
    usual = partial(concatenated, mask=torch.zeros(mask.shape, dtype=dy.dtype).to(dy).masked_fill(~mask, -torch.inf))
    ours = partial(pk.functional.prefix_attention, is_causal=True)
    oracle = partial(pk.reference.prefix_attention, is_causal=True)
    work = checked(lambda: training(oracle, exact(tensors), dy.double())(), lambda: training(usual, tensors, dy)())
    work.add(FUNCTIONAL, "ours", lambda: training(ours, tensors, dy))
    work.add(CONCATENATED, "peer", lambda: training(usual, tensors, dy))
    work.add(PLAIN, "floor", lambda: training(plain, tensors[:3], dy))
    return work


def decoding(options: Options, b: int, h: int, hkv: int, keys: int, d: int, p: int) -> Work:
    """One token against a cache of L keys; the peer's cache holds the prefix already, repeated over the batch."""
    (_, k, v, prefix_k, prefix_v, _), _ = inputs(options, b, h, hkv, keys, d, p)
    q = options.randn(b, h, 1, d)
    k, v, prefix_k, prefix_v = (t.detach().contiguous() for t in (k, v, prefix_k, prefix_v))
    cache = [torch.cat([prefix.repeat(b, 1, 1, 1), t], dim=2) for prefix, t in ((prefix_k, k), (prefix_v, v))]

    tensors = q, k, v, prefix_k, prefix_v
    usual = without_grad(partial(F.scaled_dot_product_attention, enable_gqa=h != hkv), q, *cache)
    work = checked(without_grad(pk.reference.prefix_attention, *(t.double() for t in tensors)), usual)
    work.add(FUNCTIONAL, "ours", lambda: [without_grad(pk.functional.prefix_attention, *tensors)])
    work.add(CONCATENATED, "peer", lambda: [usual])
    work.add(PLAIN, "floor", lambda: [without_grad(plain, q, k, v)])
    return work


def gated(options: Options, b: int, h: int, hkv: int, length: int, d: int, p: int) -> Work:
    """Forward and backward, causal; all six gradients are computed. PEFT's prompt attention is eager, in float32."""
    tensors, dy = inputs(options, b, h, hkv, length, d, p)

    def usual(q: Any, k: Any, v: Any, prompt_k: Any, prompt_v: Any, gate: Any) -> torch.Tensor:
        prompt_k, prompt_v = (t.repeat_interleave(h // hkv, dim=0).repeat(b, 1, 1, 1) for t in (prompt_k, prompt_v))
        scores = q @ prompt_k.mT / d**0.5
        prompted = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ prompt_v
        return plain(q, k, v) + gate[:, None, None] * prompted

    ours = partial(pk.functional.gated_prompt_attention, is_causal=True)
    oracle = partial(pk.reference.gated_prompt_attention, is_causal=True)
    work = checked(lambda: training(oracle, exact(tensors), dy.double())(), lambda: training(usual, tensors, dy)())
    work.add(FUNCTIONAL, "ours", lambda: training(ours, tensors, dy))
    work.add(TWICE, "peer", lambda: training(usual, tensors, dy))
    work.add(PLAIN, "floor", lambda: training(plain, tensors[:3], dy))
    return work
