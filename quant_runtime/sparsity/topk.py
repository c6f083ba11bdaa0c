"""Each block of queries keeps the key blocks that score highest: mean query against mean key, per head and call.

The pooled scores are SpargeAttn's (arXiv:2502.18137); what is ours: a fixed number of blocks per row in place of its
cumulative threshold, so that the density asked for is the density that runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from quant_runtime.kernels import block_map
from quant_runtime.sparsity.always import always_kept, check_block, check_density, kept_in_order, placeless_first
from quant_runtime.sparsity.base import LAYOUTS, AttentionCall, Blocks, Seen, TokenLayout


@dataclass(frozen=True)
class TopK:
    """`density` is the kept fraction of all key blocks, the always-kept included; a row keeps at least one block.

    Always kept: text and special tokens as keys, their own rows whole; and the first frame as keys with `first_frame`,
    as Sparse-VideoGen has it for Wan. Where these alone exceed `density`, they are what is kept. Special tokens, which
    lie scattered in front of every frame, are gathered in front of the sequence first, so that they fill blocks of
    their own.
    """

    density: float = 0.25
    block: int = 64
    first_frame: bool = False

    def __post_init__(self) -> None:
        check_density(self.density)
        check_block(self.block)

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        return placeless_first(layout)

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        forced, whole = always_kept(call.layout, seen.block, self.first_frame, seen.device)
        keep = _count(self, call.layout, seen.block)
        q_means, k_means = seen.means()
        kept, counts = block_map.choose(q_means, k_means, keep, forced, whole)
        return Blocks(kept, counts, seen.block, seen.block, k_means.shape[2])


@functools.lru_cache(maxsize=LAYOUTS)
def _count(policy: TopK, layout: TokenLayout, block: int) -> int:
    """How many blocks a row keeps that does not keep all."""
    order = policy.orders(layout, block)
    forced, whole = kept_in_order(layout, None if order is None else order[0], block, policy.first_frame)
    rows, sparse_rows = len(whole), int((~whole).sum())
    wanted = policy.density * rows * rows - (rows - sparse_rows) * rows
    keep = max(1, int(forced.sum()), round(wanted / sparse_rows) if sparse_rows else rows)
    return min(keep, rows)
