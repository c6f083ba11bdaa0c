"""Each block of queries keeps the fewest key blocks that hold a share of its attention, by mean query and mean key.

SpargeAttn (arXiv:2502.18137) with its guard; its skip of P V products and its search for thresholds per head are not
here. Which share of all blocks that is follows from the heads: the record of a run tells the density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from quant_runtime.kernels.blocks_by_mass import blocks_by_mass
from quant_runtime.sparsity.always import always_kept, check_block, placeless_first
from quant_runtime.sparsity.base import AttentionCall, Blocks, Seen, TokenLayout


@dataclass(frozen=True)
class TopP:
    """`mass` is the share of the softmax over mean scores that a row keeps, its tau; 1 is dense.

    A block whose tokens are less alike than `alike` (mean cosine of its pairs, its theta) is stood for by no mean: as a
    key it is always kept and out of the softmax, as queries its row is whole. 0 turns that off. Of keys their mean is
    taken away before they are compared, as their rounding does. `least` and `most` bound the kept fraction of a row.
    Always kept besides: text and special tokens as keys, their own rows whole; and the first frame as keys with
    `first_frame`. What these hold of a row counts first.
    """

    mass: float = 0.9
    alike: float = 0.1
    least: float = 0.0
    most: float = 1.0
    block: int = 64
    first_frame: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is above 0 and at most 1; got {self.mass}")
        if not 0 <= self.alike <= 1:
            raise ValueError(f"alike is a mean cosine, 0 to 1; got {self.alike}")
        if not 0 <= self.least <= self.most <= 1 or self.most == 0:
            raise ValueError(f"least and most are fractions, 0 <= least <= most <= 1; got {self.least}, {self.most}")
        check_block(self.block)

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        return placeless_first(layout)

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        forced, whole = always_kept(call.layout, seen.block, self.first_frame, seen.device)
        q_means, k_means = seen.means()
        q_alike, k_alike = seen.alike() if self.alike else (None, None)
        keys = k_means.shape[2]
        least, most = max(1, math.ceil(self.least * keys)), max(1, math.floor(self.most * keys))
        kept, counts = blocks_by_mass(
            q_means, k_means, self.mass, min(least, most), most, forced, whole, q_alike, k_alike, self.alike
        )
        return Blocks(kept, counts, seen.block, seen.block, keys)
