"""Each block of queries keeps the key blocks that score highest: mean query against mean key, per head and call.

The pooled scores are SpargeAttn's (arXiv:2502.18137); what is ours: a fixed number of blocks per row in place of its
cumulative threshold, so that the density asked for is the density that runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_runtime.kernels import block_map
from quant_runtime.sparsity.base import (
    LAYOUTS,
    AttentionCall,
    Blocks,
    TokenLayout,
    blocks_with,
    first_frame,
    placeless,
)


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
        if not 0 < self.density <= 1:
            raise ValueError(f"density is above 0 and at most 1; got {self.density}")
        if self.block not in (16, 32, 64, 128):
            raise ValueError(f"block is 16, 32, 64 or 128 tokens; got {self.block}")

    def order(self, layout: TokenLayout) -> Tensor | None:
        return _placeless_first(layout) if layout.special else None

    def blocks(self, q: Tensor, k: Tensor, call: AttentionCall) -> Blocks | None:
        keep, forced, whole = _fixed(self, call.layout, self.block, q.device)
        keys = -(-k.shape[2] // self.block)
        kept, counts = block_map.block_map(q, k, keep, self.block, self.block, forced, whole)
        return Blocks(kept, counts, self.block, self.block, keys)

    def blocks_by_means(self, q_means: Tensor, k_means: Tensor, call: AttentionCall, block: int) -> Blocks | None:
        keep, forced, whole = _fixed(self, call.layout, block, q_means.device)
        kept, counts = block_map.choose(q_means, k_means, keep, forced, whole)
        return Blocks(kept, counts, block, block, k_means.shape[2])


@functools.lru_cache(maxsize=LAYOUTS)
def _placeless_first(layout: TokenLayout) -> Tensor:
    return torch.argsort((~placeless(layout)).to(torch.int8), stable=True)


@functools.lru_cache(maxsize=LAYOUTS)
def _fixed(
    policy: TopK, layout: TokenLayout, block: int, device: torch.device
) -> tuple[int, Tensor | None, Tensor | None]:
    """What does not depend on q and k: blocks a row keeps, blocks every row keeps, rows that keep all."""
    order = policy.order(layout)
    free = placeless(layout) if order is None else placeless(layout)[order]
    always = free
    if policy.first_frame:
        always = free | (first_frame(layout) if order is None else first_frame(layout)[order])
    forced, whole = blocks_with(always, block), blocks_with(free, block)

    rows = len(whole)
    sparse_rows = rows - int(whole.sum())
    wanted = policy.density * rows * rows - (rows - sparse_rows) * rows
    keep = max(1, int(forced.sum()), round(wanted / sparse_rows) if sparse_rows else rows)
    return (
        min(keep, rows),
        forced.to(device) if bool(forced.any()) else None,
        whole.to(device) if bool(whole.any()) else None,
    )
