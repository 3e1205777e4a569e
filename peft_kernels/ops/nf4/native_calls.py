"""The codec on the native core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ... import native
from .reference import NESTED_BLOCKSIZE, dynamic_map

if TYPE_CHECKING:
    from ...weight4bit import Weight4bit

QUANT_TYPE_CODES = {"nf4": 0, "fp4": 1}


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the native codec cannot serve such tensors."""
    return native.why_not_tensors(device, dtypes)


def quantize(flat: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat (n,) -> packed (ceil(n / 2),) uint8, absmax (ceil(n / blocksize),) float32."""
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    native.core().quantize_4bit(
        flat.data_ptr(),
        native.dtype_code(flat.dtype),
        n,
        blocksize,
        QUANT_TYPE_CODES[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


def quantize_nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax (n,) float32 -> codes (n,) uint8, absmax2 (ceil(n / 256),) float32, offset () float32."""
    n, offset = absmax.numel(), absmax.mean()
    code = dynamic_map(absmax.device)
    codes = torch.empty(n, dtype=torch.uint8)
    absmax2 = torch.empty(-(-n // NESTED_BLOCKSIZE), dtype=torch.float32)
    native.core().quantize_nested(
        absmax.data_ptr(),
        n,
        offset.data_ptr(),
        code.data_ptr(),
        NESTED_BLOCKSIZE,
        codes.data_ptr(),
        absmax2.data_ptr(),
    )
    return codes, absmax2, offset


def native_weight(weight: Weight4bit) -> Any:
    """The C++ view of a Weight4bit; it holds pointers, so the weight must outlive it.

    It is kept on the weight until a tensor has another address (its storage may be resized or swapped under it). Of a
    tiled weight, a copy in bitsandbytes' layout is kept with it.
    """
    nested = weight.nested
    addresses: tuple[int, ...] = (
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        *(
            (0, 0, 0)
            if nested is None
            else (nested.absmax2.data_ptr(), nested.code.data_ptr(), nested.offset.data_ptr())
        ),
    )
    if weight.layout != "bnb" and not weight.packed.is_inference():  # a copy also ages when its original is written to
        addresses = *addresses, weight.packed._version
    kept = weight.__dict__.get("_native")
    if kept is not None and kept[0] == addresses:
        return kept[1]
    canonical = weight.with_layout("bnb")
    # a weight without elements has second statistics without addresses, and the core takes all of them or none
    statistics = addresses[1:5] if addresses[2] else (addresses[1], 0, 0, 0)
    view = native.core().Weight4(
        canonical.packed.data_ptr(),
        *statistics,
        0 if nested is None else nested.blocksize,
        QUANT_TYPE_CODES[weight.quant_type],
        *weight.shape,
        weight.blocksize,
    )
    weight.__dict__["_native"] = addresses, view, canonical.packed
    return view


def dequantize(
    weight: Weight4bit, dtype: torch.dtype, rows: tuple[int, int] | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """W (N, K) of dtype, or its rows from and to, into `out` (a contiguous tensor of as many elements) where given."""
    (first, last), k = (0, weight.shape[0]) if rows is None else rows, weight.shape[1]
    out = torch.empty((last - first, k), dtype=dtype) if out is None else out
    code = native.dtype_code(dtype)
    native.core().dequantize_4bit(native_weight(weight), first * k, last * k, out.data_ptr(), code)
    return out
