"""Argument errors: one wording for all of them (argument, expected, got, remedy)."""

from __future__ import annotations

import torch
from torch import nn


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call."""


def bad_value(argument: str, expected: str, got: object, remedy: str) -> ValueError:
    """The ValueError for a wrong `argument`."""
    return ValueError(f"{argument}: expected {expected}, got {got}. {remedy}")


def bad_type(argument: str, expected: str, got: object, remedy: str) -> TypeError:
    """The TypeError for an `argument` of the wrong kind."""
    return TypeError(f"{argument}: expected {expected}, got {type(got).__name__}. {remedy}")


def check_virtual_tokens(value: int) -> None:
    """The length of a learned prompt."""
    if value < 1:
        raise bad_value("num_virtual_tokens", "at least 1", value, "Typical are 10 to 100.")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch refuses to say for "meta", which it leaves as it is."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_range(argument: str, value: object, high: float, expected: str, remedy: str) -> None:
    """A number from 0 to `high`."""
    if not isinstance(value, (int, float)):
        raise bad_type(argument, expected, value, remedy)
    if not 0 <= value <= high:
        raise bad_value(argument, expected, value, remedy)


def check_probability(argument: str, value: object) -> None:
    """A number from 0 to 1."""
    check_range(argument, value, 1, "a probability from 0 to 1", "Check the adapter's configuration.")


def check_linear(argument: str, layer: object, *others: type[nn.Module]) -> None:
    """An nn.Linear or one of `others`; not bitsandbytes' subclasses, whose weight is codes, even where of floats."""
    if not isinstance(layer, (nn.Linear, *others)):
        expected = " or ".join(("nn.Linear", *(other.__name__ for other in others)))
        raise bad_type(argument, expected, layer, "Pass the linear layer itself.")
    if isinstance(layer, nn.Linear) and (not layer.weight.is_floating_point() or hasattr(layer.weight, "quant_state")):
        remedy = "Use from_bnb for a bitsandbytes.nn.Linear4bit; dequantize any other quantized layer first."
        raise bad_type(argument, "nn.Linear with a dense weight", layer, remedy)


def check_bnb(argument: str, layer: object) -> None:
    """A bitsandbytes.nn.Linear4bit, known by its weight's attribute."""
    if not hasattr(getattr(layer, "weight", None), "quant_state"):
        raise bad_type(argument, "a bitsandbytes.nn.Linear4bit", layer, "Use from_linear for an nn.Linear.")


def check_tensor(argument: str, value: object, ndim: int | None = None) -> None:
    """A floating-point tensor, of `ndim` dimensions where given."""
    if not isinstance(value, torch.Tensor):
        raise bad_type(argument, "a torch.Tensor", value, "Pass a tensor.")
    if not value.is_floating_point():
        raise bad_value(argument, "a floating-point tensor", value.dtype, "Cast it to bfloat16, float16 or float32.")
    if ndim is not None and value.ndim != ndim:
        raise bad_value(argument, f"{ndim} dimensions", f"shape {tuple(value.shape)}", "Reshape it.")


def check_shape(argument: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of exactly this shape."""
    if value.shape != shape:
        raise bad_value(argument, f"shape {shape}", f"{tuple(value.shape)}", "Match it to the weight (N, K).")


def check_device(argument: str, value: torch.Tensor, device: torch.device) -> None:
    """A tensor that lies where the input lies."""
    if value.device != device:
        raise bad_value(argument, f"device {device} (that of x)", value.device, f"Move it with .to('{device}').")


def check_operand(argument: str, value: object, shape: tuple[int, ...], device: torch.device) -> None:
    """A floating-point tensor of exactly this shape that lies where the input lies: all of it in one condition."""
    if (
        isinstance(value, torch.Tensor)
        and value.shape == shape
        and value.device == device
        and value.is_floating_point()
    ):
        return
    check_tensor(argument, value)
    assert isinstance(value, torch.Tensor)
    check_shape(argument, value, shape)
    check_device(argument, value, device)


def check_input(x: object, in_features: int) -> None:
    """x of shape (..., K)."""
    check_tensor("x", x)
    assert isinstance(x, torch.Tensor)
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise bad_value(
            "x", f"shape (..., {in_features})", tuple(x.shape), "Its last dimension must be the weight's K."
        )


def check_bias(bias: object, out_features: int, device: torch.device) -> None:
    """bias of shape (N,), or None."""
    if bias is None:
        return
    check_tensor("bias", bias, 1)
    assert isinstance(bias, torch.Tensor)
    check_shape("bias", bias, (out_features,))
    check_device("bias", bias, device)
