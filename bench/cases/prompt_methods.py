"""Prompt methods: LLaMA-Adapter's attention layer, decoding with a prefix, and prompts before embedded tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import peft_kernels as pk

from ..case import FUNCTIONAL, OURS, Call, Case, Goal, Options, Training, Work, checked, dtype_name
from ..inputs import replaced, unchanged
from ..peers import peft_prompts

PROMPT, PREFIX = 10, 32
CONCATENATED = "embedding + cat"


def cases(options: Options) -> Iterator[Case]:
    """LLaMA-Adapter's attention layer; one token decoded with a prefix; prompts before embedded tokens."""
    judged = options.device.type == "cpu" and not options.quick
    width, heads, kv_heads, length = (256, 4, 2, 32) if options.quick else (4096, 32, 32, 512)
    facts: dict[str, Any] = {"B": 1, "L": length, "width": width, "heads": heads, "P": PROMPT}
    facts["dtype"] = dtype_name(options.dtype)
    goals = (Goal(peft_prompts.NAME, OURS, at_least=1.5),) if judged else ()
    work = partial(adapted_layer, options, width, heads, kv_heads, length)
    yield Case(f"LLaMA-Adapter attention, width {width}, L={length}", "forward + backward", facts, work, goals)

    goals = (Goal(peft_prompts.NAME, OURS, at_least=1.0),) if judged else ()
    for batch in (1, 4):
        facts = {"B": batch, "cache": length, "width": width // 4, "layers": 2, "P": PREFIX}
        facts["dtype"] = dtype_name(options.dtype)
        work = partial(decode, options, width // 4, heads // 2, kv_heads // 2, length, batch)
        yield Case(f"prefix-tuned Llama, cache of {length}, B={batch}", "decode one token", facts, work, goals)

    facts = {"B": 4, "L": length, "hidden": width, "P": 20, "dtype": dtype_name(options.dtype)}
    goals = (Goal(CONCATENATED, FUNCTIONAL, at_least=1.5),) if judged else ()
    work = partial(embedding, options, 4, length, width)
    yield Case(f"prompt embedding, B=4, L={length}, hidden={width}", "forward + backward", facts, work, goals)


def adapted_layer(options: Options, width: int, heads: int, kv_heads: int, length: int) -> Work:
    """Forward and backward; the gradients of x, of the prompt and of the gate are computed."""
    torch.manual_seed(0)
    x, dy = options.randn(1, length, width, grad=True), options.randn(1, length, width)
    if why_not := peft_prompts.why_not():
        work = Work(lambda name: None)
        work.add(OURS, "ours", list, why_not)
        return work
    layer = peft_prompts.AdaptedLayer(width, heads, kv_heads, PROMPT, length, options.dtype, options.device)

    def training(wrap: Callable[[torch.nn.Module], torch.nn.Module], x: torch.Tensor = x) -> Training:
        module: Any = wrap(copy.deepcopy(layer))
        adapted = module.adapted
        leaves = {"dx": x, "dprompt": adapted.adaption_prompt, "dgate": adapted.adaption_gate}
        return Training(lambda: module(x), leaves, dy.to(x.dtype))

    def reference() -> Training:
        return training(torch.nn.Module.double, x.detach().double().requires_grad_())

    work = checked(lambda: reference()(), lambda: training(unchanged)())
    work.add(OURS, "ours", lambda: training(replaced))
    work.add(peft_prompts.NAME, "peer", lambda: training(unchanged))
    return work


def decode(options: Options, width: int, heads: int, kv_heads: int, length: int, batch: int) -> Work:
    """One token through two layers against a cache of `length` tokens and a prefix."""
    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (batch, length + 1)).to(options.device)
    if why_not := peft_prompts.why_not():
        work = Work(lambda name: None)
        work.add(OURS, "ours", list, why_not)
        return work
    model = peft_prompts.prefix_model(width, heads, kv_heads, 2, PREFIX).to(options.device)

    def decoding(wrap: Callable[[torch.nn.Module], torch.nn.Module], dtype: torch.dtype) -> list[Call]:
        return [peft_prompts.Decoding(wrap(copy.deepcopy(model).to(dtype)), ids)]

    work = checked(lambda: decoding(unchanged, torch.float64)[0](), lambda: decoding(unchanged, options.dtype)[0]())
    work.add(OURS, "ours", lambda: decoding(replaced, options.dtype))
    work.add(peft_prompts.NAME, "peer", lambda: decoding(unchanged, options.dtype))
    return work


def embedding(options: Options, batch: int, length: int, hidden: int) -> Work:
    """[prompt; E[ids]] and the gradient of the prompt."""
    torch.manual_seed(0)
    ids = torch.randint(0, 8192, (batch, length)).to(options.device)
    weight, prompt = options.randn(8192, hidden), options.randn(20, hidden, dtype=torch.float32, grad=True)
    dy = options.randn(batch, 20 + length, hidden)

    def training(function: Callable[..., torch.Tensor], weight: Any, prompt: Any, dy: Any = dy) -> Training:
        return Training(lambda: function(ids, weight, prompt), {"dprompt": prompt}, dy)

    def concatenated(ids: torch.Tensor, weight: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return torch.cat((prompt.repeat(batch, 1, 1).to(weight.dtype), F.embedding(ids, weight)), dim=1)

    def reference() -> Training:
        exact = prompt.detach().to(weight.dtype).double().requires_grad_()
        return training(pk.reference.prompt_embedding, weight.double(), exact, dy.double())

    work = checked(lambda: reference()(), lambda: training(concatenated, weight, prompt)())
    work.add(FUNCTIONAL, "ours", lambda: training(pk.functional.prompt_embedding, weight, prompt))
    work.add(CONCATENATED, "peer", lambda: training(concatenated, weight, prompt))
    out = torch.empty_like(dy)
    work.add("copy", "floor", lambda: [lambda: (out.copy_(dy), dy[:, :20].sum(0))])
    return work
