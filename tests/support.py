"""How tests measure an error: against the size of the answer, so that all zeros would score 1."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; NaN where `got` holds one, so that no comparison with it passes."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def largest_error(got: Tensor, want: Tensor) -> float:
    """The largest single difference, over the largest entry of the answer."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max())
