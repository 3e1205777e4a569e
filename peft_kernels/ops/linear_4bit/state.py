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
        f"{prefix}.quant_map": code_book(weight.quant_type, weight.device),
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
        absmax, packed, nested = state[keys[1]], state[prefix], None
        if "nested_blocksize" in facts:
            keys += [f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"]
            offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32, device=packed.device)
            nested = Nested(state[keys[4]], state[keys[5]], offset, int(facts["nested_blocksize"]))
    except (KeyError, TypeError, ValueError) as error:
        remedy = "The checkpoint is damaged or was written by something else."
        raise bad_value(prefix, "a complete quantization state", f"{error!r}", remedy) from error
    if blocksize < 1 or min(shape, default=0) < 0 or (nested is not None and nested.blocksize < 1):
        raise bad_value(prefix, "positive sizes", f"shape {shape}, blocksize {blocksize}", "The checkpoint is damaged.")
    packed = packed.contiguous().view(torch.uint8).reshape(-1)
    weight = Weight4bit(packed, absmax.reshape(-1), nested, shape, dtype, blocksize, quant_type)  # type: ignore[arg-type]
    return weight, keys
