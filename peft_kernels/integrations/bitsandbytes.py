"""bitsandbytes' Linear4bit on `linear_4bit`; the methods but `forward` are bitsandbytes' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import nn

from .. import dispatch
from ..checks import autocasts
from ..functional import linear_4bit
from ..weight4bit import Weight4bit
from .base_layer import overridden
from .replace import FOUR_BIT, Undo


class _View:
    """A Weight4bit and what it was made from, to notice when that changes; copies and pickles of a layer drop it.

    It keeps the tensors alive, so that an address that is still the same is still the same tensor.
    """

    __slots__ = ("absmax", "offset", "param", "pointer", "state", "state2", "weight")

    def __init__(self, param: Any):
        self.weight = Weight4bit.from_bnb(param)
        self.param, self.state, self.pointer = param, param.quant_state, _pointer(param)
        self.absmax, self.offset, self.state2 = self.state.absmax, self.state.offset, self.state.state2

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class FusedForward:
    """`forward` for bitsandbytes' Linear4bit: never repacks the weight, never casts the bias in place."""

    _weight_view: _View | None = None

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why no call of this layer can be served, or None."""
        reason = overridden(layer)
        return _why_not_weight(layer) if reason is None else f"its {reason}"

    @staticmethod
    def _prepare(layer: Any) -> list[Undo]:
        """Bring a weight that bitsandbytes has repacked for its CPU kernel back to the layout that trains and saves."""
        param = layer.weight
        if not getattr(param.quant_state, "packing_format_for_cpu", False):
            return []
        before = param.data, param.quant_state, layer.quant_state

        def undo() -> None:
            param.data, param.quant_state, layer.quant_state = before

        _unpack_in_place(layer)
        return [undo]

    @property
    def _input_dtype(self: Any) -> torch.dtype:
        dtype = self.compute_dtype if self.compute_type_is_set else self.weight.quant_state.dtype
        return dtype or self.weight.quant_state.dtype

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) of x's dtype, computed in `compute_dtype` as bitsandbytes does."""
        weight = self._weight4bit()
        if isinstance(weight, str) or not x.is_floating_point():
            return self._forward_of_bitsandbytes(x, weight)
        dtype, device, compute = x.dtype, x.device, self._compute_dtype_for(x)
        bias = self._parameters["bias"]
        if compute is not dtype:
            x = x.to(compute)
        if autocasts(device) and torch.get_autocast_dtype(device.type) is not compute:
            with torch.autocast(device.type, enabled=False):  # as bitsandbytes, which computes in compute_dtype
                y = self._linear(x, weight, bias)
        else:
            y = self._linear(x, weight, bias)
        return y if compute is dtype else y.to(dtype)

    def _linear(self, x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
        """The operation; layers that train more than their bias have another."""
        return linear_4bit(x, weight, bias)

    def _forward_of_bitsandbytes(self: Any, x: torch.Tensor, reason: object) -> torch.Tensor:
        """What we do not serve."""
        if dispatch.recording():
            why = f"its {reason}" if isinstance(reason, str) else f"x is {x.dtype}"
            dispatch.note(f"Linear4bit: left to bitsandbytes: {why}", final=True)
        return super().forward(x)  # type: ignore[misc]

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """Whether bitsandbytes may repack the weight for its CPU kernel; the plain class has its own value back."""
        return False

    @support_avx512bf16_for_cpu.setter
    def support_avx512bf16_for_cpu(self, value: bool) -> None:
        self.__dict__["support_avx512bf16_for_cpu"] = value

    def _weight4bit(self: Any) -> Weight4bit | str:
        """The weight, sharing bitsandbytes' memory, or why it cannot be read; kept until the parameter changes."""
        view, param = self._weight_view, self._parameters.get("weight")
        if view is not None and view.param is param:
            state = view.state
            same = state is param.quant_state and state.absmax is view.absmax
            same = same and state.offset is view.offset and state.state2 is view.state2
            if same and (torch.compiler.is_compiling() or _pointer(param) == view.pointer):  # no address in a trace
                return view.weight
        reason = _why_not_weight(self)
        if reason is not None:
            return reason
        if getattr(self.weight.quant_state, "packing_format_for_cpu", False):
            _unpack_in_place(self)
        view = _View(self.weight)
        self.__dict__["_weight_view"] = view
        return view.weight

    def _compute_dtype_for(self: Any, x: torch.Tensor) -> torch.dtype:
        """The dtype bitsandbytes computes in; the first call settles it."""
        if not self.compute_type_is_set:
            if dispatch.recording():
                settled = x.dtype in (torch.float32, torch.bfloat16)
                return x.dtype if settled else self.compute_dtype or x.dtype
            self.set_compute_type(x)
            self.compute_type_is_set = True
        return self.compute_dtype or x.dtype


class FusedLinear4bit(FusedForward, bnb.nn.Linear4bit):
    """`bitsandbytes.nn.Linear4bit`."""


class FusedLinearNF4(FusedForward, bnb.nn.LinearNF4):
    """`bitsandbytes.nn.LinearNF4`."""


class FusedLinearFP4(FusedForward, bnb.nn.LinearFP4):
    """`bitsandbytes.nn.LinearFP4`."""


# PEFT and transformers compare the class's name with "Linear4bit"; pickle uses the qualified name, which stays.
FOUR_BIT += [FusedLinear4bit, FusedLinearNF4, FusedLinearFP4]
for _cls in FOUR_BIT:
    _cls.__name__ = _cls.__name__.removeprefix("Fused")


def _why_not_weight(layer: Any) -> str | None:
    """Why the weight cannot be read past the module, or None."""
    if type(layer.weight) not in (nn.Parameter, bnb.nn.Params4bit):  # unpickling makes plain parameters
        return f"weight is a {type(layer.weight).__name__}"
    if getattr(layer.weight, "quant_state", None) is None:
        if getattr(layer, "quant_state", None) is None:
            return "weight is not quantized yet (move the layer to a device first)"
        fix_4bit_weight_quant_state_from_module(layer)  # FSDP drops it; bitsandbytes' own forward does the same
    if layer.weight.device.type == "meta":
        return "weight is on the meta device"
    shape = tuple(layer.weight.quant_state.shape)
    if shape != (layer.out_features, layer.in_features):
        return f"weight was quantized with shape {shape}, not (out_features, in_features)"
    return None


def _pointer(param: torch.Tensor) -> int:
    """The data's address (a call on the Params4bit itself takes five times as long: it has a __torch_function__)."""
    with torch._C.DisableTorchFunctionSubclass():
        return param.data_ptr()


def _unpack_in_place(layer: Any) -> None:
    """Rewrite bitsandbytes' CPU layout as the canonical one, in the same parameter.

    The scales stay as the repacking left them, rounded to bfloat16, and plain: nesting them again would round twice.
    """
    param = layer.weight
    packed_state = param.quant_state
    dtype = getattr(packed_state, "original_dtype", packed_state.dtype)
    canonical = dataclasses.replace(Weight4bit.from_bnb(param), dtype=dtype).to_bnb()
    storage = getattr(packed_state, "original_storage_type", None) or torch.uint8
    shape = getattr(packed_state, "original_qshape", canonical.shape)
    param.data = canonical.data.view(shape).view(storage)
    param.quant_state = layer.quant_state = canonical.quant_state
