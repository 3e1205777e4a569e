"""What the operations' autograd Functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_ONCE = (
    "the fused kernels have no second derivative. For a gradient of a gradient choose the reference: "
    'with peft_kernels.use_backend("reference"): ...'
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results refuse to be differentiated where a graph of them is asked for (create_graph=True).

    torch's own decorator lets them pass as constants where no upstream gradient requires a gradient, though they depend
    on the saved tensors: a penalty on gradients would train nothing, silently.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        refuse: Any = torch._C._functions.DelayedError(_ONCE, len(results))
        return refuse(*(r if r is None else r.detach().requires_grad_() for r in results))

    return wrapper
