"""IA³, BitFit and scale-bias linear layers: the public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import dispatch
from ...checks import autocasts, check_device, check_tensor
from ...weight4bit import Weight4bit, check_base
from . import reference
from .autograd import apply
from .scales import combined_scale
from .vendor import why_vendor


def ia3_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    scale: torch.Tensor | Sequence[torch.Tensor],
    *,
    bias: torch.Tensor | None = None,
    is_feedforward: bool = False,
) -> torch.Tensor:
    """Linear layer with a learned scale of its output, Y = l * (x W^T + b), or of its input, Y = (l * x) W^T + b.

    Backward, with Y0 = x W^T + b: dX = (dY * l) W, dl = sum dY * Y0, db = l * sum dY. With `is_feedforward`:
    dX = l * (dY W), dl = sum x * (dY W), db = sum dY. Nothing is divided by l: all are exact where l is 0.

    Args:
        x: (..., K) bfloat16, float16 or float32; any strides.
        weight: (N, K) of x's dtype, or a Weight4bit of shape (N, K). A dense weight may be trained too.
        scale: l, (N,) or (N, 1), with `is_feedforward` (K,) or (1, K), of any floating dtype; or a sequence of such
            vectors, one for each active adapter, which multiply.
        bias: (N,) of any floating dtype, or None.
        is_feedforward: scale the input (IA³ on the second layer of an MLP) rather than the output (keys and values).

    Returns:
        Tensor: (..., N) of x's dtype, accumulated in float32. Under autocast, of the autocast dtype.

    Saved for backward, only if l needs a gradient: Y0 in x's dtype, or for a feed-forward layer x itself; x also where
    a dense W is trained.

    Raises:
        TypeError: weight or scale is of the wrong kind. ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this call.

    Source: IA³, arXiv:2205.05638, section 3.3; the bias inside the scaled output is Hugging Face PEFT's.
    """
    check_base(x, weight, bias)
    return _scaled_linear(x, weight, bias, combined_scale(scale, weight.shape, is_feedforward), is_feedforward)


def bitfit_linear(x: torch.Tensor, weight: torch.Tensor | Weight4bit, bias: torch.Tensor) -> torch.Tensor:
    """Linear layer of which the bias is trained: Y = x W^T + b, and backward dX = dY W, db = sum dY.

    Args:
        x: (..., K) bfloat16, float16 or float32; any strides.
        weight: (N, K) of x's dtype, or a Weight4bit of shape (N, K). A dense weight may be trained too.
        bias: (N,) of any floating dtype; it is never cast in memory.

    Returns:
        Tensor: (..., N) of x's dtype, accumulated in float32. Under autocast, of the autocast dtype.

    x is not saved for backward (but where a dense W is trained); db is summed in float32 in one pass over dY. Over a
    dense W on a CPU that multiplies x's dtype all that is what torch's own linear layer does, and `auto` calls it.

    Raises:
        TypeError: weight is neither kind, or bias no tensor. ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this call.

    Source: BitFit, arXiv:2106.10199, section 3.
    """
    check_tensor("bias", bias, 1)
    check_base(x, weight, bias)
    return _scaled_linear(x, weight, bias, None, False)


def scale_bias_linear(
    x: torch.Tensor, weight: torch.Tensor | Weight4bit, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear layer with a learned scale and a learned bias: Y = a * (x W^T + b).

    Backward, with Y0 = x W^T + b: dX = (dY * a) W, da = sum dY * Y0, db = a * sum dY.

    Args:
        x: (..., K) bfloat16, float16 or float32; any strides.
        weight: (N, K) of x's dtype, or a Weight4bit of shape (N, K). A dense weight may be trained too.
        scale: a, (N,) or (N, 1), of any floating dtype.
        bias: (N,) of any floating dtype, or None for a layer that trains its scale alone.

    Returns:
        Tensor: (..., N) of x's dtype, accumulated in float32. Under autocast, of the autocast dtype.

    Saved for backward: Y0 in x's dtype, only if a needs a gradient; x where a dense W is trained.

    Raises:
        TypeError: weight or scale is of the wrong kind. ValueError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this call.

    Source: LLaMA-Adapter V2, arXiv:2304.15010, equation 2.
    """
    check_base(x, weight, bias)
    return _scaled_linear(x, weight, bias, combined_scale(scale, weight.shape, False), False)


def _scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Weight4bit,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    is_feedforward: bool,
) -> torch.Tensor:
    """What the three have in common, on the backend that is chosen."""
    if scale is not None:
        check_device("scale", scale, x.device)
    if autocasts(x.device):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = weight.to(x.dtype) if isinstance(weight, torch.Tensor) else weight
    dtypes = (x.dtype, *(t.dtype for t in (bias, scale) if t is not None))
    backend = dispatch.choose("scaled_linear", x.device, dtypes, why_vendor(x, weight, bias, scale, is_feedforward))
    if backend == "reference":
        return reference.scaled_linear(x, weight, bias, scale, is_feedforward)
    return apply(x, weight, bias, scale, is_feedforward, backend)
