"""Weight4bit: the 4-bit weight that every operation takes, sharing memory with bitsandbytes' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import dispatch
from .checks import autocasts, bad_type, bad_value, check_bias, check_device, check_input, check_tensor
from .ops.nf4 import layout as layouts
from .ops.nf4 import op as nf4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DECODED = (*DTYPES, torch.float64)

_lib = torch.library.Library("peft_kernels", "FRAGMENT")
_lib.define("dequantize_4bit(Tensor[] weight, int[] meta, ScalarType dtype, str backend) -> Tensor")


@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
    """Double quantization: block i has the scale code[absmax[i]] * absmax2[i // blocksize] + offset, in float32.

    absmax2: (ceil(blocks / blocksize),) float32; code: (256,) float32; offset: () float32; blocksize: usually 256.
    """

    absmax2: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor
    blocksize: int


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit:
    """A weight W (N, K) in NF4 or FP4 (QLoRA, arXiv:2305.14314), in bitsandbytes' layout unless told otherwise.

    packed: (ceil(N * K / 2),) uint8, row-major, the even element in the high nibble (layout "bnb").
    absmax: (ceil(N * K / blocksize),) float32, or uint8 codes when nested.
    nested: the statistics of double quantization, or None.
    shape: (N, K); dtype: what `dequantize()` returns unless told otherwise; quant_type: "nf4" or "fp4".
    layout: "bnb", or "tiled": the codes in the order of GPU kernels for few rows; see `with_layout`.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested: Nested | None
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    layout: str = "bnb"

    def __post_init__(self) -> None:
        _check_choices(self.quant_type, self.dtype)
        if self.blocksize < 32 or self.blocksize & (self.blocksize - 1):
            raise bad_value("blocksize", "a power of two, at least 32", self.blocksize, "The default is 64.")
        if self.layout not in layouts.LAYOUTS:
            raise bad_value("layout", f"one of {layouts.LAYOUTS}", repr(self.layout), "Use with_layout to change it.")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise bad_value("shape", "(N, K), not negative", self.shape, "Reshape the weight to two dimensions.")
        nested, blocks = self.nested, self.blocks
        packed_bytes = (self.shape[0] * self.shape[1] + 1) // 2
        self._check_part("packed", self.packed, packed_bytes, torch.uint8)
        self._check_part("absmax", self.absmax, blocks, torch.float32 if nested is None else torch.uint8)
        if nested is not None:
            if nested.blocksize < 1:
                raise bad_value("nested.blocksize", "at least 1", nested.blocksize, "bitsandbytes' is 256.")
            self._check_part("nested.absmax2", nested.absmax2, -(-blocks // nested.blocksize), torch.float32)
            self._check_part("nested.code", nested.code, 256, torch.float32)
            self._check_part("nested.offset", nested.offset, 1, torch.float32)

    def _check_part(self, name: str, tensor: object, length: int, dtype: torch.dtype) -> None:
        """What kernels take for granted of one of the tensors: they read its memory."""
        if not isinstance(tensor, torch.Tensor):
            raise bad_type(name, "a torch.Tensor", tensor, "Build it with Weight4bit.quantize or from_bnb.")
        if tensor.numel() != length:
            remedy = "The data is truncated or belongs to another shape or blocksize."
            raise bad_value(name, f"{length} elements for shape {tuple(self.shape)}", tensor.numel(), remedy)
        if tensor.dtype != dtype:
            raise bad_value(name, str(dtype), tensor.dtype, "Build it with Weight4bit.quantize or from_bnb.")
        if not tensor.is_contiguous():
            raise bad_value(name, "a contiguous tensor", f"strides {tensor.stride()}", "Pass it .contiguous().")
        if tensor.device != self.device:
            remedy = f"Move it with .to('{self.device}')."
            raise bad_value(name, f"device {self.device} (that of packed)", tensor.device, remedy)

    @property
    def blocks(self) -> int:
        """How many scales the weight has."""
        return -(-self.shape[0] * self.shape[1] // self.blocksize)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all statistics."""
        return sum(t.numel() * t.element_size() for t in self.parts())

    def __repr__(self) -> str:
        n, k = self.shape
        kind = "nested" if self.nested is not None else "plain"
        kind += ", tiled" if self.layout == "tiled" else ""
        return f"Weight4bit({n}x{k}, {self.quant_type}, blocksize={self.blocksize}, {kind}, dtype={self.dtype})"

    def __getstate__(self) -> dict:
        # `native_weight` caches a view of the memory here, which means nothing in a copy or another process
        return {key: value for key, value in self.__dict__.items() if key != "_native"}

    @classmethod
    def quantize(
        cls, w: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> Weight4bit:
        """Quantize w (N, K) of float32, float16 or bfloat16.

        The codes and the float32 absmax equal bitsandbytes' bit for bit. With `double_quant` the absmax are stored as
        the exact nearest 8-bit code (bitsandbytes' CPU path bins them first: about 0.1 % of its codes are a neighbour,
        and its mean depends on the order of summation).

        Raises:
            ValueError: w is not two-dimensional, not dense or not of such a dtype; unknown quant_type; blocksize not a
                power of two from 32 to 4096.
        """
        check_tensor("w", w, 2)
        if w.dtype not in DTYPES:
            raise bad_value("w", f"a dtype of {DTYPES}", w.dtype, "Cast it first.")
        if w.layout is not torch.strided:
            raise bad_value("w", "a dense tensor", w.layout, "Pass w.to_dense().")
        _check_choices(quant_type, w.dtype)
        if blocksize not in nf4.BLOCKSIZES:
            raise bad_value("blocksize", f"one of {nf4.BLOCKSIZES}", blocksize, "The default is 64.")
        flat = w.detach().contiguous().view(-1)
        packed, absmax = nf4.quantize(flat, blocksize, quant_type)
        nested = None
        if double_quant:
            absmax, absmax2, offset = nf4.quantize_nested(absmax)
            nested = Nested(absmax2, nf4.dynamic_map(w.device), offset, nf4.NESTED_BLOCKSIZE)
        return cls(packed, absmax, nested, (w.shape[0], w.shape[1]), w.dtype, blocksize, quant_type)

    @classmethod
    def from_bnb(cls, weight: Any) -> Weight4bit:
        """Share the memory of a bitsandbytes weight: a `Params4bit`, or a pair (packed, quant_state).

        A weight that bitsandbytes has repacked in place for its CPU kernel (after a forward in eval mode on a machine
        with AVX512-BF16) is unpacked into a new tensor; its scales stay as that repacking rounded them, to bfloat16.

        Raises:
            TypeError: neither of the two. ValueError: not quantized yet, not a matrix, or damaged.
        """
        if isinstance(weight, tuple) and len(weight) != 2:
            raise bad_value("weight", "a pair (packed, quant_state)", f"{len(weight)} items", "Pass layer.weight.")
        packed, state = weight if isinstance(weight, tuple) else (weight, getattr(weight, "quant_state", None))
        if not isinstance(packed, torch.Tensor):
            raise bad_type("weight", "a Params4bit or (packed, quant_state)", weight, "Pass layer.weight.")
        if state is None:
            remedy = "Move the layer to a device first (layer.to('cpu') or .to('cuda')): bitsandbytes quantizes then."
            raise bad_value("weight", "a quantized weight with a quant_state", "quant_state None", remedy)
        if not hasattr(state, "absmax"):
            raise bad_type("quant_state", "a bitsandbytes QuantState", state, "Build one with QuantState.from_dict.")
        if len(state.shape or ()) != 2:
            remedy = "Only a linear layer's weight is a matrix."
            raise bad_value("quant_state.shape", "(N, K)", state.shape and tuple(state.shape), remedy)
        data, absmax, nested = packed.data.reshape(-1).view(torch.uint8), state.absmax, None
        n, k = state.shape
        if getattr(state, "packing_format_for_cpu", False):
            data, absmax = _unpack_cpu_layout(data, n, k), absmax.t().float().contiguous()
        elif state.nested:
            inner = state.state2
            # transformers loads with the model's dtype as torch's default, and bitsandbytes makes some of these in that
            nested = Nested(inner.absmax.float(), inner.code.float(), state.offset.float(), inner.blocksize)
        return cls(data, absmax.reshape(-1), nested, (n, k), state.dtype, state.blocksize, state.quant_type)

    def to_bnb(self) -> Any:
        """A `bitsandbytes.nn.Params4bit` that shares this weight's memory (a copy of the codes if they are tiled)."""
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        inner = None
        if self.nested is not None:
            n = self.nested
            inner = QuantState(absmax=n.absmax2, blocksize=n.blocksize, code=n.code, dtype=torch.float32)
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=nf4.code_book(self.quant_type, self.device).clone(),  # safetensors refuses memory shared by layers
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=None if self.nested is None else self.nested.offset,
            state2=inner,
        )
        return bitsandbytes.nn.Params4bit(
            self.with_layout("bnb").packed.view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.nested is not None,
            quant_type=self.quant_type,
            bnb_quantized=True,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W (N, K) in `dtype` (default: the dtype it was quantized from): code * scale in float32, rounded once.

        Raises:
            TypeError, ValueError: dtype is not float32, float16, bfloat16 or (on the reference path) float64.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in _DECODED:
            wrong = bad_value if isinstance(dtype, torch.dtype) else bad_type
            raise wrong("dtype", f"one of {_DECODED}", dtype, "Decode to one of them, then cast.")
        backend = dispatch.choose("nf4", self.device, (dtype,))
        if backend == "reference" or self.packed.numel() == 0:
            return nf4.dequantize_reference(self, dtype)
        return torch.ops.peft_kernels.dequantize_4bit(self.parts(), self.meta(), dtype, backend)

    def with_layout(self, layout: str) -> Weight4bit:
        """The same weight with its codes in another order; bit for bit the same values, and the same size.

        "tiled" is for the GPU kernels that serve few rows (`linear_4bit`, `lora_linear`): inside every 64 weights the
        codes lie as the tensor cores take them. A weight whose rows are not whole blocks of 64 or more has no such
        order and stays as it is. State dicts and `to_bnb` are in bitsandbytes' layout always. The native kernels and
        the reference serve a tiled weight from a copy: on the CPU, change it back with `with_layout("bnb")`.

        Raises:
            ValueError: unknown layout.
        """
        if layout not in layouts.LAYOUTS:
            raise bad_value("layout", f"one of {layouts.LAYOUTS}", repr(layout), "Choose 'bnb' or 'tiled'.")
        whole = self.shape[1] % self.blocksize == 0 and self.blocksize % layouts.TILE == 0
        if layout == self.layout or not whole:
            return self
        packed = (layouts.tile if layout == "tiled" else layouts.untile)(self.packed)
        return dataclasses.replace(self, packed=packed, layout=layout)

    def to(self, device: torch.device | str) -> Weight4bit:
        """The same weight on another device."""
        parts = [part.to(device) for part in self.parts()]
        return Weight4bit.from_parts(parts, self.meta())

    def parts(self) -> list[torch.Tensor]:
        """Its tensors: [packed, absmax] or [packed, absmax, absmax2, code, offset]; with `meta()` the whole weight."""
        if self.nested is None:
            return [self.packed, self.absmax]
        return [self.packed, self.absmax, self.nested.absmax2, self.nested.code, self.nested.offset]

    def meta(self) -> list[int]:
        """What is not a tensor: N, K, blocksize, nested blocksize, and the indices of quant_type, dtype, layout."""
        nested_blocksize = self.nested.blocksize if self.nested is not None else 0
        indices = nf4.QUANT_TYPES.index(self.quant_type), DTYPES.index(self.dtype), layouts.LAYOUTS.index(self.layout)
        return [*self.shape, self.blocksize, nested_blocksize, *indices]

    @classmethod
    def from_parts(cls, parts: list[torch.Tensor], meta: list[int]) -> Weight4bit:
        """The inverse of `parts()` and `meta()`."""
        n, k, blocksize, nested_blocksize, quant_type, dtype, layout = meta
        nested = Nested(parts[2], parts[3], parts[4], nested_blocksize) if nested_blocksize else None
        # built without __init__, at a third of its cost: the parts were checked when the weight was first made
        weight = object.__new__(cls)
        weight.__dict__.update(
            packed=parts[0],
            absmax=parts[1],
            nested=nested,
            shape=(n, k),
            dtype=DTYPES[dtype],
            blocksize=blocksize,
            quant_type=nf4.QUANT_TYPES[quant_type],
            layout=layouts.LAYOUTS[layout],
        )
        return weight


def _check_choices(quant_type: str, dtype: torch.dtype) -> None:
    """What a weight may be besides its tensors."""
    if quant_type not in nf4.QUANT_TYPES:
        raise bad_value("quant_type", f"one of {nf4.QUANT_TYPES}", repr(quant_type), "Choose 'nf4' or 'fp4'.")
    if dtype not in DTYPES:
        raise bad_value("dtype", f"one of {DTYPES}", dtype, "Choose the dtype of the layer's input.")


def _unpack_cpu_layout(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """bitsandbytes' CPU layout [N/32][K/2][32 bytes] -> the canonical one.

    Byte j of a group: element (row j // 2, column j % 2) in the low nibble, that of row 16 + j // 2 in the high one.
    """
    if n % 32 or k % 2 or 2 * data.numel() != n * k:
        expected, got = f"{n * k // 2} bytes of whole groups of 32 rows", f"{data.numel()} for shape {(n, k)}"
        raise bad_value("weight", expected, got, "The data is truncated or belongs to another shape.")
    groups = data.view(n // 32, k // 2, 16, 2)
    rows = torch.stack([groups & 0xF, groups >> 4], dim=2).view(n // 32, k // 2, 32, 2)
    nibbles = rows.transpose(1, 2).reshape(-1, 2)
    return (nibbles[:, 0] << 4) | nibbles[:, 1]


@torch.library.impl(_lib, "dequantize_4bit", "CompositeExplicitAutograd")
def _dequantize_4bit(parts: list[torch.Tensor], meta: list[int], dtype: torch.dtype, backend: str) -> torch.Tensor:
    return dispatch.implementation("nf4", backend).dequantize(Weight4bit.from_parts(parts, meta), dtype)


@torch.library.register_fake("peft_kernels::dequantize_4bit", lib=_lib)
def _dequantize_4bit_fake(parts: list[torch.Tensor], meta: list[int], dtype: torch.dtype, backend: str) -> torch.Tensor:
    return parts[0].new_empty((meta[0], meta[1]), dtype=dtype)


def quantize_4bit(
    w: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> Weight4bit:
    """Quantize a weight to 4 bits: each value becomes the code nearest to w / absmax of its block.

    Args:
        w: (N, K) float32, float16 or bfloat16.
        quant_type: "nf4" or "fp4". blocksize: a power of two from 32 to 4096.
        double_quant: store the absmax in 8 bits as well.

    Returns:
        Weight4bit: codes and float32 absmax equal to bitsandbytes' bit for bit.

    Raises:
        ValueError, TypeError: see `Weight4bit.quantize`.

    Source: QLoRA, arXiv:2305.14314, equations 1 to 3.
    """
    return Weight4bit.quantize(w, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype | None = None) -> torch.Tensor:
    """W = code[q] * scale in float32, rounded once to `dtype`; bit for bit what bitsandbytes returns.

    Args:
        weight: Weight4bit of shape (N, K).
        dtype: float32, float16 or bfloat16 (float64 on the reference path); default weight.dtype.

    Returns:
        Tensor: (N, K) of dtype, without gradient.

    Raises:
        TypeError: weight is no Weight4bit, or dtype no dtype. ValueError: another dtype.
    """
    return check_weight4bit(weight).dequantize(dtype)


def check_weight4bit(weight: Any) -> Weight4bit:
    """The weight itself, or a TypeError that says how to make one."""
    if not isinstance(weight, Weight4bit):
        raise bad_type("weight", "a Weight4bit", weight, "Make one with quantize_4bit or Weight4bit.from_bnb.")
    return weight


def check_base(x: torch.Tensor, weight: object, bias: object) -> tuple[int, int]:
    """(N, K) of an adapted layer's weight, dense or 4-bit, that fits x and bias."""
    if not isinstance(weight, (torch.Tensor, Weight4bit)):  # a union would be made anew at every call
        raise bad_type("weight", "a torch.Tensor or a Weight4bit", weight, "Pass layer.weight or a Weight4bit.")
    if len(weight.shape) != 2:
        raise bad_value("weight", "shape (N, K)", tuple(weight.shape), "Pass the linear layer's weight.")
    out_features, in_features = weight.shape
    check_input(x, in_features)
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype and not autocasts(x.device):
        raise bad_value("weight", f"dtype {x.dtype} (that of x)", weight.dtype, "Cast x to the weight's dtype.")
    check_device("weight", weight if isinstance(weight, torch.Tensor) else weight.packed, x.device)
    check_bias(bias, out_features, x.device)
    return out_features, in_features


def split_base(weight: torch.Tensor | Weight4bit) -> tuple[list[torch.Tensor], list[int]]:
    """An adapted layer's weight as library operations take it: tensors, and the rest (empty for a dense weight)."""
    return (weight.parts(), weight.meta()) if isinstance(weight, Weight4bit) else ([weight], [])


def join_base(parts: list[torch.Tensor], meta: list[int]) -> torch.Tensor | Weight4bit:
    """The inverse of `split_base`."""
    return Weight4bit.from_parts(parts, meta) if meta else parts[0]
