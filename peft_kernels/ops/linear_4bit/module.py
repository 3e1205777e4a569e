"""Linear4bit: nn.Linear with a frozen 4-bit weight; FrozenWeight: what it shares with layers that train more."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...checks import bad_type, check_bnb, check_linear
from ...weight4bit import Weight4bit
from .op import linear_4bit
from .state import from_state, to_state


class FrozenWeight(nn.Module):
    """A layer with a frozen `weight` (N, K), 4-bit or dense, that moves, saves and loads with it.

    The state dict has bitsandbytes' keys and layout for a 4-bit weight, and loads in both directions; the weight keeps
    its own layout.
    """

    weight: Any  # a Weight4bit or an nn.Parameter

    def __init__(self, weight: Weight4bit | torch.Tensor):
        super().__init__()
        dense = isinstance(weight, torch.Tensor)
        if not (dense or isinstance(weight, Weight4bit)):
            raise bad_type("weight", "a torch.Tensor or a Weight4bit", weight, "Use from_linear or from_bnb.")
        self.weight = nn.Parameter(weight, requires_grad=False) if dense else weight  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenWeight:
        super()._apply(fn, recurse)
        if isinstance(self.weight, Weight4bit):
            # Only the device follows the module: casting the scales or the codes would destroy the weight.
            device = fn(torch.empty(0, device=self.weight.device)).device
            if device != self.weight.device:
                self.weight = self.weight.to(device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, Weight4bit):
            destination.update(to_state(self.weight, prefix + "weight"))

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        entry = prefix + "weight"
        if not isinstance(self.weight, Weight4bit):
            return  # a parameter like any other
        if entry not in state_dict:
            missing_keys.append(entry)
            return
        taken = [key for key in state_dict if key == entry or key.startswith(entry + ".")]
        try:
            weight, taken = from_state(state_dict, entry)
            self._take(weight, entry, assign=local_metadata.get("assign_to_params_buffers", False))
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
        unexpected_keys[:] = [key for key in unexpected_keys if key not in taken]

    def _take(self, weight: Weight4bit, entry: str, *, assign: bool) -> None:
        """Make `weight`, or a copy of it where this layer lies, this layer's own, on torch's terms for a parameter."""
        own = self.weight
        if weight.shape != own.shape:
            # torch's words, by which callers know this error
            raise ValueError(
                f"size mismatch for {entry}: copying a param with shape {torch.Size(weight.shape)} from checkpoint, "
                f"the shape in current model is {torch.Size(own.shape)}."
            )
        if not assign:
            if own.device.type == "meta" != weight.device.type:
                message = "copying from a checkpoint to a meta weight, which is a no-op. Pass assign=True to take it."
                warnings.warn(f"for {entry}: {message}", stacklevel=2)
                return
            copies = [part.to(own.device, copy=True) for part in weight.parts()]
            weight = Weight4bit.from_parts(copies, weight.meta())
        self.weight = weight.with_layout(own.layout)


class Linear4bit(FrozenWeight):
    """Y = x W^T + b over a frozen 4-bit weight; see `peft_kernels.functional.linear_4bit`.

    Its state dict has bitsandbytes' keys, and loads in both directions.

    Args:
        weight: Weight4bit of shape (N, K). bias: (N,) or None; trainable if it requires a gradient.
    """

    def __init__(self, weight: Weight4bit, bias: torch.Tensor | None = None):
        super().__init__(weight)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> Linear4bit:
        """Quantize the weight of `linear`; its bias is shared."""
        check_linear("linear", linear)
        options: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
        return cls(Weight4bit.quantize(linear.weight, **options), linear.bias)

    @classmethod
    def from_bnb(cls, layer: nn.Module) -> Linear4bit:
        """Share the weight and the bias of a `bitsandbytes.nn.Linear4bit`."""
        check_bnb("layer", layer)
        return cls(Weight4bit.from_bnb(layer.weight), layer.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        return linear_4bit(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"{self.weight}, bias={self.bias is not None}"
