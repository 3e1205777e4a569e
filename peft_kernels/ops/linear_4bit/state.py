"""A Weight4bit as state-dict entries under bitsandbytes' keys, so that checkpoints go both ways without bitsandbytes.

`weight` (n, 1) uint8, `weight.absmax`, `weight.quant_map`, with double quantization `weight.nested_absmax` and
`weight.nested_quant_map`, and what is not a tensor as JSON in the uint8 tensor `weight.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ...checks import bad_value
from ...weight4bit import DTYPES, Nested, Weight4bit
from ..nf4.op import code_book

# What reading entries of wrong kinds, ranks and ranges raises.
_DAMAGE = (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def to_state(weight: Weight4bit, prefix: str) -> dict[str, torch.Tensor]:
    """The entries of `weight`, their keys starting with `prefix` (which ends in "weight")."""
    facts: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {
        prefix: weight.with_layout("bnb").packed.view(-1, 1),
        f"{prefix}.absmax": weight.absmax,
        f"{prefix}.quant_map": code_book(weight.quant_type, weight.device).clone(),  # safetensors refuses shared memory
    }
    if weight.nested is not None:
        entries[f"{prefix}.nested_absmax"] = weight.nested.absmax2
        entries[f"{prefix}.nested_quant_map"] = weight.nested.code.clone()
        facts |= {
            "nested_blocksize": weight.nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": weight.nested.offset.item(),
        }
    blob = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    entries[f"{prefix}.quant_state.bitsandbytes__{weight.quant_type}"] = blob
    return entries


def from_state(state: dict[str, torch.Tensor], prefix: str) -> tuple[Weight4bit, list[str]]:
    """The weight under `prefix`, and the keys it was made from.

    Raises:
        ValueError: an entry is missing, or does not fit the others.
    """
    blobs = [key for key in state if key.startswith(f"{prefix}.quant_state.bitsandbytes__")]
    if len(blobs) != 1:
        remedy = "Save the layer with its state_dict()."
        raise bad_value(prefix, "one entry '.quant_state.bitsandbytes__<type>'", f"{len(blobs)} of them", remedy)
    keys = [prefix, f"{prefix}.absmax", f"{prefix}.quant_map", blobs[0]]
    try:
        facts = json.loads(bytes(state[blobs[0]].cpu().tolist()))
        blocksize, quant_type = int(facts["blocksize"]), facts["quant_type"]
        shape, dtype = tuple(int(n) for n in facts["shape"]), _DTYPE_NAMES[facts["dtype"]]
        packed, absmax, quant_map = (state[key] for key in keys[:3])
        packed, absmax = packed.reshape(-1).contiguous().view(torch.uint8), absmax.reshape(-1).contiguous()
        quant_map, nested = quant_map.cpu(), None
        if "nested_blocksize" in facts:
            keys += [f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"]
            offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32, device=packed.device)
            absmax2, code = (state[key].reshape(-1).contiguous() for key in keys[4:])
            nested = Nested(absmax2, code, offset, int(facts["nested_blocksize"]))
    except _DAMAGE as error:
        remedy = "The checkpoint is damaged or was written by something else."
        raise bad_value(prefix, "a complete quantization state", f"{error!r}", remedy) from error
    weight = Weight4bit(packed, absmax, nested, shape, dtype, blocksize, quant_type)  # type: ignore[arg-type]
    book = code_book(quant_type, quant_map.device).to(quant_map.dtype)  # a cast model has a cast map
    if not (quant_map.is_floating_point() and torch.equal(quant_map.reshape(-1), book)):
        remedy = f"Only the data type {quant_type} as bitsandbytes has it can be decoded."
        raise bad_value(keys[2], f"the 16 values of {quant_type}", quant_map.tolist(), remedy)
    return weight, keys
