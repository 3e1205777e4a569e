"""The 4-bit codec in pure torch: the oracle, and the only Python copy of the code books.

Layout (that of bitsandbytes): the tensor is flattened row-major and cut into blocks of `blocksize`; a block's scale is
its absolute maximum; byte i holds element 2i in its high nibble and element 2i + 1 in its low one.
Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

CODES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # sign, two exponent bits, one mantissa bit; twelve is the largest magnitude
    "fp4": tuple(
        sign * magnitude / 12.0 for sign in (1, -1) for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
NESTED_BLOCKSIZE = 256


def tensor_cache(make: Callable) -> Callable:
    """`functools.cache` for tensors that serve every later call, whatever mode the first is made in."""

    @functools.cache
    def cached(*args: object) -> object:
        with torch.inference_mode(False):
            return make(*args)

    @functools.wraps(make)
    def get(*args: object) -> object:
        c = torch._C
        # a compiler, fake tensors, transforms: what is made under them must neither outlive them nor come from outside
        if torch.compiler.is_compiling() or c._len_torch_dispatch_stack() or c._functorch.peek_interpreter_stack():
            return make(*args)
        return cached(*args)

    return get


@tensor_cache
def code_book(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 float32 values of a 4-bit type."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@tensor_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 float32 values of the signed 8-bit dynamic data type (arXiv:2110.02861, section 2.2)."""
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


def _dynamic_values() -> list[float]:
    values = [0.0, 1.0]
    with _disable_current_modes():  # fake tensors have no values
        for exponent in range(7):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
            means = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            values += means + [-mean for mean in means]
    return sorted(values)


_dynamic_values._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch: it has no argument


def quantize(x: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat x (n,) -> packed (ceil(n / 2),) uint8 and absmax (ceil(n / blocksize),) float32; ties go down."""
    code, order = code_book(quant_type, x.device).sort(stable=True)
    midpoints = (code[:-1] + code[1:]) / 2
    n, tail = x.numel(), x.numel() % blocksize
    values = x.float()
    blocks = values[: n - tail].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else values.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)
    if tail:  # bitsandbytes divides here, and clamps the stored maximum too
        tail_absmax = values[n - tail :].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, (values[n - tail :] / tail_absmax).clamp(-1, 1)])
    if n % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    nibbles = order[torch.bucketize(scaled, midpoints)].to(torch.uint8)
    return (nibbles[::2] << 4) | nibbles[1::2], absmax


def quantize_nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax (n,) float32 -> nearest codes (n,) uint8, absmax2 (ceil(n / 256),) float32, offset () float32."""
    offset = absmax.mean()
    n = absmax.numel()
    centred = torch.nn.functional.pad(absmax - offset, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax2 = centred.abs().amax(dim=1)
    scaled = centred * (1 / absmax2.clamp(min=1e-38))[:, None]
    code = dynamic_map(absmax.device).double()
    codes = torch.bucketize(scaled.double(), (code[:-1] + code[1:]) / 2)
    return codes.view(-1)[:n].to(torch.uint8), absmax2, offset


def scales(absmax: torch.Tensor, nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None) -> torch.Tensor:
    """The float32 scale of each block; nested is (absmax2, code, offset, blocksize)."""
    if nested is None:
        return absmax.float()
    absmax2, code, offset, blocksize = nested
    return code[absmax.long()] * absmax2.repeat_interleave(blocksize)[: absmax.numel()] + offset


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, numel: int, blocksize: int, quant_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """(numel,) of dtype: code * scale in float32, rounded once."""
    nibbles = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[:numel].long()
    values = code_book(quant_type, packed.device)[nibbles]
    return (values * scale.repeat_interleave(blocksize)[:numel]).to(dtype)
