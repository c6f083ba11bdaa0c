"""Lists of blocks that follow from the layout alone: made once for each layout and device, and looked up after that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_runtime.sparsity.base import Blocks, Seen

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, without their whole part, are spread evenly however many there are


@dataclass(frozen=True)
class Lists:
    """Of each way: kept int32 [ways, rows, L], counts int32 [ways, rows]."""

    kept: Tensor
    counts: Tensor

    @classmethod
    def of(cls, masks: Tensor, device: torch.device) -> Lists:
        """Of bool [ways, rows, keys]: what each row keeps."""
        counts = masks.sum(dim=2, dtype=torch.int32)
        kept = (~masks).to(torch.int8).sort(dim=2, stable=True).indices[..., : int(counts.max())]
        listed = torch.arange(kept.shape[2]) < counts[..., None]
        return cls(torch.where(listed, kept, 0).to(device, torch.int32), counts.to(device))

    def blocks(self, seen: Seen, ways: Tensor | None) -> Blocks:
        """Of each head those of its way, int64 [B, H], or of all heads those of the only way there is."""
        if ways is None:
            kept = self.kept[0].expand(*seen.heads, -1, -1)
            counts = self.counts[0].expand(*seen.heads, -1)
        else:
            kept, counts = self.kept[ways], self.counts[ways]
        return Blocks(kept, counts, seen.block, seen.block, self.counts.shape[1])


def nearest(distance: Tensor, forced: Tensor, whole: Tensor, density: float) -> Tensor:
    """bool [rows, keys]: the nearest pairs of blocks of distance [rows, rows], `density` of all pairs to half a pair.

    What is `forced` (keys) and `whole` (rows), bool [rows], counts among them, and each row's own block; where these
    alone are more, they are what is kept. Pairs that are equally far and do not all find room are shared out evenly
    over the rows.
    """
    rows = len(distance)
    kept = forced | whole[:, None] | torch.eye(rows, dtype=torch.bool)
    room = round(density * rows * rows) - int(kept.sum())
    if room > 0:
        spread = (torch.arange(rows, dtype=torch.float64) * GOLDEN % 1)[:, None].expand(rows, rows)
        by_spread = spread.flatten().argsort(stable=True)
        order = by_spread[distance.flatten()[by_spread].argsort(stable=True)]
        order = order[~kept.flatten()[order]]
        kept.view(-1)[order[:room]] = True
    return kept
