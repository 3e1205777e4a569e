"""The activations of a bottleneck adapter, by their names in torch, transformers and the `adapters` library."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...checks import bad_type, bad_value

# In the order of `enum class Activation` in csrc/cpu/activation.h; a kernel takes the index.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_ALIASES = {
    "linear": "identity",
    "leakyrelu": "leaky_relu",
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"
    ),
}  # fmt: skip


def canonical(activation: object) -> str:
    """The key of ACTIVATIONS that a name means, in any case.

    Raises:
        TypeError: it is no string. ValueError: no kernel computes it.
    """
    if not isinstance(activation, str):
        raise bad_type("activation", "a name", activation, "Pass a name such as 'relu' or 'gelu'.")
    name = activation.lower()
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *_ALIASES))
        raise bad_value("activation", f"one of {known}", repr(activation), "Use torch modules for any other.")
    return name


_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def activation_code(name: str) -> int:
    """What kernels know a canonical name by."""
    return _CODES[name]
