"""Tensors that get new numbers where they lie: what has been recorded reads them there (quant_runtime/graphs.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def taken(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether each of ours can be what its fellow is, of the same shape and dtype: all are then, where they lie.

    Not where it was made under inference_mode and is to be changed outside of it, which torch refuses.
    """
    alike = [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    if not alike or (any(x.is_inference() for x in ours) and not torch.is_inference_mode_enabled()):
        return False
    for mine, other in zip(ours, theirs, strict=True):
        mine.copy_(other)
    return True
