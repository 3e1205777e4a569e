"""Predicted times of a QLoRA layer over many rows: LoRA in the dense GEMM, panels, the whole step and its peers'."""

from __future__ import annotations

import math

from .model import COPY, HALF, LAUNCH, Device, decode, gemm

# What a Triton GEMM reaches of the vendor's rate: published runs of Triton's persistent GEMM tutorial (H100, fp16,
# tensor descriptors: 262 of 285 TFLOP/s; A100: on par within a few percent); the other two are guesses.
OWN_GEMM = {"sm_80": 0.95, "sm_90": 0.92, "sm_100": 0.85, "gfx942": 0.85}
# How much of the time to read a matrix that a GEMM adds to is hidden behind the products of other tiles: a guess.
HIDDEN = 0.5
DY_TILE = 256  # columns of dY for which one partial T is kept
FLOAT = 4
WIDE = 2  # N / K from which on the operation makes the forward product longer


def copy_seconds(device: Device, nbytes: float) -> float:
    """Seconds to move so many bytes."""
    return nbytes / (device.bandwidth * COPY)


def lora_ways(device: Device, m: int, n: int, k: int, rank: int, masked: bool = False) -> dict[str, float]:
    """Way -> seconds that adding a low-rank term to x (M, K) W^T costs on top of the vendor's GEMM.

    masked: the term has a dropout mask, as dX's has.
    """
    dense = gemm(device, m, n, k).seconds
    padded = 16 * math.ceil(rank / 16)
    return {
        "own GEMM that starts from it": dense * (1 / OWN_GEMM[device.target] - 1),
        # the shrink reads x anyway and writes it beside S; W's scratch is ours
        "K longer by r": math.inf
        if masked
        else copy_seconds(device, HALF * m * k) + gemm(device, m, n, k + padded).tensor * padded / k + 2 * LAUNCH,
        "pass over the result": copy_seconds(device, 2 * HALF * m * n) + LAUNCH,
        "vendor GEMM adds to it": copy_seconds(device, HALF * m * n * (2 - HIDDEN)) + LAUNCH,
    }


def panels(device: Device, m: int, n: int, k: int, rows: int) -> float:
    """Seconds of decode + GEMM, `rows` rows of W at a time: a panel in L2 saves traffic, waves may be part-filled."""

    def filled(columns: int) -> float:
        tiles = math.ceil(m / 128) * math.ceil(columns / 256)
        return tiles / (math.ceil(tiles / device.multiprocessors) * device.multiprocessors)

    in_l2 = HALF * rows * k <= device.l2 / 2
    product = gemm(device, m, n, k).tensor / min(1.0, filled(min(rows, n)) / filled(n))
    decoded = decode(device, n, k, in_l2)
    return max(decoded.memory, decoded.issue) + product + 2 * math.ceil(n / rows) * LAUNCH


def dense_step(device: Device, m: int, n: int, k: int) -> float:
    """The floor: forward and dX of the dense layer."""
    return gemm(device, m, n, k).seconds + gemm(device, m, k, n).seconds


def _base_step(device: Device, m: int, n: int, k: int) -> float:
    return dense_step(device, m, n, k) + 2 * decode(device, n, k).seconds


def step(device: Device, m: int, n: int, k: int, rank: int) -> float:
    """Ours, forward + backward: shrink reads x, one pass over dY gives T and dB, dA reads x; two terms added."""
    longer, adds = "K longer by r", "vendor GEMM adds to it"
    added = lora_ways(device, m, n, k, rank)[longer if n >= WIDE * k else adds] + lora_ways(device, m, k, n, rank)[adds]
    planes = 2 * FLOAT * m * rank * n / DY_TILE
    return _base_step(device, m, n, k) + added + copy_seconds(device, HALF * m * (2 * k + n) + planes) + 6 * LAUNCH


def unsloth_order(device: Device, m: int, n: int, k: int) -> float:
    """Its order: x read for S, again in backward, and for dA; dY for T and for dB; y and dX read and written again."""
    nbytes = HALF * m * (3 * k + 2 * n) + 2 * HALF * m * (n + k)
    return _base_step(device, m, n, k) + copy_seconds(device, nbytes) + 12 * LAUNCH


def peft_bnb(device: Device, m: int, n: int, k: int) -> float:
    """PEFT over bitsandbytes, float32 adapters: bytes of each element-wise pass and product of its code, in float32.

    Per element of y: clone 4, B's product 4, scaling 8, cast 6, sum 6; backward cast 6, scaling 8, two products 8.
    Per element of x: cast 6, A's product 4; backward dA 4, dX 4, cast 6, sum 6.
    """
    return _base_step(device, m, n, k) + copy_seconds(device, m * (50 * n + 30 * k)) + 24 * LAUNCH


def peak_bytes(m: int, n: int, k: int, rank: int) -> tuple[float, float]:
    """Ours and PEFT's, beyond x, dY and the parameters.

    Ours: y, the decoded weight, the copy of x of a longer product, dX, T's planes. PEFT's, in backward: y, x in
    float32, dY in float32 and scaled, the decoded weight, dX in float32 and cast.
    """
    ours = HALF * (m * n + n * k + (2 if n >= WIDE * k else 1) * m * k) + FLOAT * m * rank * (n / DY_TILE + 2)
    return ours, HALF * (m * n + n * k + m * k) + FLOAT * (2 * m * n + 2 * m * k)
