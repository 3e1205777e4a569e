"""The codec on raw tensors, each function by the backend that can run it; `weight4bit` gives it its public face."""

from __future__ import annotations

from typing import Any

import torch

from ... import dispatch
from . import reference
from .reference import NESTED_BLOCKSIZE, code_book, dynamic_map

__all__ = ["NESTED_BLOCKSIZE", "code_book", "dynamic_map"]

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define("quantize_4bit(Tensor flat, int blocksize, str quant_type, str backend) -> (Tensor, Tensor)")
_lib.define("quantize_nested(Tensor absmax) -> (Tensor, Tensor, Tensor)")


def quantize(flat: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat (n,) -> packed (ceil(n / 2),) uint8, absmax (ceil(n / blocksize),) float32."""
    backend = dispatch.choose("nf4", flat.device, (flat.dtype,))
    if backend == "reference" or flat.numel() == 0:
        return reference.quantize(flat, blocksize, quant_type)
    return torch.ops.peft_kernels.quantize_4bit(flat, blocksize, quant_type, backend)


def quantize_nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax (n,) float32 -> codes (n,) uint8, absmax2 (ceil(n / 256),) float32, offset () float32."""
    if dispatch.choose("nf4", absmax.device, (absmax.dtype,)) == "native" and absmax.numel():
        return torch.ops.peft_kernels.quantize_nested(absmax)
    return reference.quantize_nested(absmax)


@torch.library.impl(_lib, "quantize_4bit", "CompositeExplicitAutograd")
def _quantize_op(flat: torch.Tensor, blocksize: int, quant_type: str, backend: str) -> tuple:
    return dispatch.implementation("nf4", backend).quantize(flat, blocksize, quant_type)


@torch.library.register_fake("peft_kernels::quantize_4bit", lib=_lib)
def _quantize_fake(flat: torch.Tensor, blocksize: int, quant_type: str, backend: str) -> tuple:
    n = flat.numel()
    packed = flat.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, flat.new_empty(-(-n // blocksize), dtype=torch.float32)


@torch.library.impl(_lib, "quantize_nested", "CompositeExplicitAutograd")
def _quantize_nested_op(absmax: torch.Tensor) -> tuple:
    return dispatch.implementation("nf4", "native").quantize_nested(absmax)


@torch.library.register_fake("peft_kernels::quantize_nested", lib=_lib)
def _quantize_nested_fake(absmax: torch.Tensor) -> tuple:
    blocks = -(-absmax.numel() // reference.NESTED_BLOCKSIZE)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(())


def dequantize_reference(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A Weight4bit's W (N, K) in pure torch."""
    n, k = weight.shape
    weight, nested = weight.with_layout("bnb"), weight.nested
    fields = None if nested is None else (nested.absmax2, nested.code, nested.offset, nested.blocksize)
    scale = reference.scales(weight.absmax, fields)
    return reference.dequantize(weight.packed, scale, n * k, weight.blocksize, weight.quant_type, dtype).view(n, k)
