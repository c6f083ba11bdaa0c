"""Each head looks along space or along time: at the frames around it, or at its own patch in all frames.

Sparse-VideoGen (arXiv:2502.01776). Both are a band |query - key| < w over an order of the tokens: frame by frame for a
spatial head; patch by patch, each through all its frames, for a temporal one, whose tokens are placed so. Which of the
two a head is, some random rows of its queries tell: they are answered with all keys, with the spatial band's and with
the temporal band's, and the band that is less off, by the mean square, is the head's.

The paper's width follows from the density s: of L tokens, ctx of them text, w = L (1 - sqrt(1 - s')) with s' = s - 2
ctx / L, which is the band whose area is what the text leaves over. Here it is taken in whole blocks: pairs of blocks
from the diagonal on, until they are that many; of the last diagonal, rows that are evenly spread.

What is ours: a head keeps to its choice until the state starts anew or a refresh chooses again (theirs is made in every
call); the rows are drawn once for a layout, among all tokens of the video; they are answered with the very blocks that
run; the first frame, with `first_frame`, counts in the density (theirs comes on top), and lies in front of the others
in the temporal order too, so that it fills blocks of its own; and a table from calibration may take the choice's place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_runtime.sparsity.always import check_block, check_density, kept_in_order
from quant_runtime.sparsity.base import (
    LAYOUTS,
    AttentionCall,
    Blocks,
    Look,
    Seen,
    TokenLayout,
    grid,
    placeless,
    placeless_together,
)
from quant_runtime.sparsity.static import Lists, nearest

SPATIAL, TEMPORAL = 0, 1
LETTERS = "st"  # of a table


@dataclass(frozen=True)
class Bands:
    """`density` is the kept fraction of all key blocks, the always-kept included; a row keeps at least its own block.

    Always kept: text and special tokens as keys, their own rows whole; and the first frame as keys with `first_frame`,
    as the paper has it for Wan. `rows` queries are looked at to choose. `table` has for each layer a letter for each
    head, s or t, and nothing is chosen where it has; a layer whose letters are left out chooses.
    """

    density: float = 0.25
    block: int = 64
    first_frame: bool = False
    rows: int = 64
    table: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_density(self.density)
        check_block(self.block)
        if self.rows < 1:
            raise ValueError(f"rows are at least one query; got {self.rows}")
        for layer, letters in enumerate(self.table):
            if set(letters) - set(LETTERS):
                raise ValueError(f"table has the letters s and t for each head; got {letters!r} for layer {layer}")

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        return torch.stack([placeless_together(layout, key) for key in _keys(layout, self.first_frame)])

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        return _lists(self, call.layout, seen.block, seen.device).blocks(seen, ways)

    def choose(self, look: Look, call: AttentionCall) -> Tensor:
        if self.table:
            fixed = _tabled(self, call.layer, look.heads[1], look.device)
            if fixed is not None:
                return fixed.expand(look.heads)
        queries, masks = _looked_at(self, call.layout, look.block, look.device)
        return torch.stack([_less_off(*look.head(h, queries), masks) for h in range(look.heads[1])], dim=1)

    def settled(self, votes: Mapping[int, Sequence[Tensor]]) -> Bands:
        """With a table of what the heads of each layer chose most often, of ways [B, H]; spatial where it is even."""
        if not votes:
            raise ValueError("no attention call has chosen: a table needs a calibration with sparse calls")
        table = [""] * (max(votes) + 1)
        for layer, ways in votes.items():
            share = torch.cat([its.double().cpu() for its in ways]).mean(dim=0)
            table[layer] = "".join(LETTERS[int(temporal > 0.5)] for temporal in share.tolist())
        return replace(self, table=tuple(table))


def _keys(layout: TokenLayout, first_frame: bool) -> tuple[Tensor, Tensor]:
    """What tokens are sorted by, int64 [tokens] each: spatial, temporal."""
    frame, patch = _frame_and_patch(layout)
    temporal = patch * layout.frames + frame
    if first_frame:
        temporal = torch.where(frame == 0, patch - layout.tokens, temporal)
    return frame * layout.height * layout.width + patch, temporal


def _frame_and_patch(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    frame, row, column = grid(layout)
    return frame, row * layout.width + column


@functools.lru_cache(maxsize=LAYOUTS)
def _kept(policy: Bands, layout: TokenLayout, block: int) -> tuple[Tensor, Tensor]:
    """bool [ways, rows, keys] of blocks, and orders int64 [ways, tokens], on the CPU."""
    frame, patch = _frame_and_patch(layout)
    along = (frame * layout.height * layout.width + patch, patch * layout.frames + frame)  # a band's two coordinates
    orders = torch.stack([placeless_together(layout, key) for key in _keys(layout, policy.first_frame)])
    masks = []
    for order, coordinate in zip(orders, along, strict=True):
        middle = _middles(coordinate[order], ~placeless(layout)[order], block)
        apart = (middle[:, None] - middle).abs()
        masks.append(nearest(apart, *kept_in_order(layout, order, block, policy.first_frame), policy.density))
    return torch.stack(masks), orders


def _middles(coordinate: Tensor, counts: Tensor, block: int) -> Tensor:
    """float64 [blocks]: the mean coordinate of a block's tokens, of those that count; 0 where none does."""
    blocks = torch.arange(len(coordinate)) // block
    sums = torch.zeros(2, int(blocks[-1]) + 1, dtype=torch.float64)
    sums[0].index_add_(0, blocks, torch.where(counts, coordinate, 0).double())
    sums[1].index_add_(0, blocks, counts.double())
    return sums[0] / sums[1].clamp(min=1)


@functools.lru_cache(maxsize=LAYOUTS)
def _lists(policy: Bands, layout: TokenLayout, block: int, device: torch.device) -> Lists:
    return Lists.of(_kept(policy, layout, block)[0], device)


@functools.lru_cache(maxsize=LAYOUTS)
def _looked_at(policy: Bands, layout: TokenLayout, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens whose queries are looked at, int64 [R], and which keys each sees, bool [ways, R, tokens]: by token."""
    kept, orders = _kept(policy, layout, block)
    video = (~placeless(layout)).nonzero()[:, 0]
    drawn = torch.randperm(len(video), generator=torch.Generator().manual_seed(0))
    queries = video[drawn[: policy.rows]].sort().values
    masks = []
    for its, order in zip(kept, orders, strict=True):
        block_of = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) // block)
        masks.append(its[block_of[queries]][:, block_of])
    return queries.to(device), torch.stack(masks).to(device)


@functools.lru_cache(maxsize=1024)  # layers, of a few models
def _tabled(policy: Bands, layer: int, heads: int, device: torch.device) -> Tensor | None:
    """int64 [H]; None for a layer without letters."""
    letters = policy.table[layer] if layer < len(policy.table) else ""
    if not letters:
        return None
    if len(letters) != heads:
        raise ValueError(
            f"table has {len(letters)} letters for layer {layer}, which has {heads} heads: another model's"
        )
    return torch.tensor([LETTERS.index(letter) for letter in letters], device=device)


def _less_off(q: Tensor, k: Tensor, v: Tensor, masks: Tensor) -> Tensor:
    """int64 [B]: which of masks bool [ways, R, N] is less off, of queries [B, R, D], keys and values [B, N, D]."""
    scores = q @ k.mT * q.shape[2] ** -0.5
    whole = scores.softmax(dim=2) @ v
    off = [
        (scores.masked_fill(~mask, -torch.inf).softmax(dim=2) @ v - whole).square().mean(dim=(1, 2)) for mask in masks
    ]
    return torch.stack(off).argmin(dim=0)
