"""What the tests and the benchmarks share: the error budget."""

from __future__ import annotations

import torch

BUDGET = 2.0


def error(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Maximum and root-mean-square difference from a float64 reference."""
    difference = actual.double() - reference.double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_within_budget(
    actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, what: str = "result"
) -> None:
    """err(actual, reference) <= 2 * err(eager, reference) + one rounding of the result.

    The last term is half a unit in the last place of the largest value (for the root mean square: spread over the
    elements): a correctly rounded result has that error, and in a small tensor eager may hit the truth by chance.

    Args:
        actual: what the kernel returned. reference: the same in float64. eager: the same by eager torch in the
            kernel's dtypes.

    Raises:
        AssertionError: beyond the budget, of another shape or dtype, or not finite where the reference is.
    """
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, not {eager.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    rounding = torch.finfo(actual.dtype).eps / 2 * reference.abs().max().item()
    roundings = {"maximum": rounding, "root-mean-square": rounding / actual.numel() ** 0.5}
    for (kind, tiny), ours, theirs in zip(
        roundings.items(), error(actual, reference), error(eager, reference), strict=True
    ):
        bound = BUDGET * theirs + tiny
        assert ours <= bound, f"{what}: {kind} error {ours:.3e} beyond {bound:.3e} (eager {theirs:.3e})"
