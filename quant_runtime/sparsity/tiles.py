"""Each tile of space and time sees the tiles of a window around it.

Sliding Tile Attention (arXiv:2502.04507): the video's tokens are ordered tile by tile, a tile of frames x rows x
columns as large as a block, so that a block of queries and a block of keys are a tile each, and the window keeps whole
blocks or none. Its window slides by tiles and stays inside of the video: at a border it is as large as elsewhere.

What is ours. The tile's shape: of those that fill a block, the most compact one among those of which nearly as many as
possible fit whole into the video (theirs is chosen with the resolution). What is left at the borders, parts of tiles,
follows behind the whole tiles, packed into blocks of several: such a block sees what any of its parts sees, and is seen
by what sees any. The window, where it is not given: the nearest tiles in a window of the video's own proportions, as
many as the density allows, so that its outermost layer may be kept in part; one window for all heads, where the paper
searches one for each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_runtime.sparsity.always import check_block, check_density, kept_in_order
from quant_runtime.sparsity.base import (
    LAYOUTS,
    AttentionCall,
    Blocks,
    Seen,
    TokenLayout,
    grid,
    placeless,
    placeless_together,
)
from quant_runtime.sparsity.static import Lists, nearest

NEARLY = 0.05  # of the tokens: so many fewer in whole tiles are given for a tile that is more compact
TIE = 1e-3  # tiles equally far by the axis on which they are farthest are told apart by the other axes


@dataclass(frozen=True)
class Tiles:
    """`density` is the kept fraction of all key blocks, the always-kept included; a row keeps at least its own block.

    `window`, frames, rows and columns in tiles, takes the place of the density. Always kept: text and special tokens as
    keys, their own rows whole; and the first frame as keys with `first_frame`: it lies in front of the tiles then, in
    blocks of its own.
    """

    density: float = 0.25
    block: int = 64
    first_frame: bool = False
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_density(self.density)
        check_block(self.block)
        if self.window and (len(self.window) != 3 or min(self.window) < 1):
            raise ValueError(f"window is three numbers of tiles, frames, rows and columns; got {self.window}")

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        return _placed(layout, block, self.first_frame)[0][None]

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        return _lists(self, call.layout, seen.block, seen.device).blocks(seen, ways)


def tile_shape(layout: TokenLayout, block: int) -> tuple[int, int, int]:
    """Frames, rows and columns, together `block` tokens."""
    extents = (layout.frames, layout.height, layout.width)
    powers = [1 << bit for bit in range(block.bit_length())]
    shapes = [(a, b, block // (a * b)) for a in powers for b in powers if a * b <= block]

    def whole(shape: tuple[int, int, int]) -> int:
        counts = [extent // side for extent, side in zip(extents, shape, strict=True)]
        return counts[0] * counts[1] * counts[2] * block

    def surface(shape: tuple[int, int, int]) -> int:
        a, b, c = shape
        return a * b + b * c + a * c

    enough = max(map(whole, shapes)) - NEARLY * layout.frames * layout.height * layout.width
    return min((shape for shape in shapes if whole(shape) >= enough), key=surface)


def _tiles(layout: TokenLayout, places: Tensor, block: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Of each of places int64 [3, tokens] in a video of the layout's size the number of its tile, row by row of the
    grid of tiles, int64 [tokens]; the same, parts of tiles behind all whole ones; that grid.
    """
    shape, extents = tile_shape(layout, block), (layout.frames, layout.height, layout.width)
    tile = [axis // side for axis, side in zip(places, shape, strict=True)]
    whole = torch.ones(places.shape[1], dtype=torch.bool)
    for its, extent, side in zip(tile, extents, shape, strict=True):
        whole &= its < extent // side
    frames, rows, columns = (-(-extent // side) for extent, side in zip(extents, shape, strict=True))
    number = (tile[0] * rows + tile[1]) * columns + tile[2]
    return number, number + torch.where(whole, 0, frames * rows * columns), (frames, rows, columns)


@functools.lru_cache(maxsize=LAYOUTS)
def _placed(layout: TokenLayout, block: int, with_first_frame: bool) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """The order int64 [tokens], the number of each token's tile, and the grid of tiles.

    Of a first frame apart the tiles are of one frame, and its tokens belong to the tiles behind it.
    """
    places = grid(layout)
    if not with_first_frame or layout.frames == 1:
        tile, key, tiles = _tiles(layout, places, block)
        return placeless_together(layout, key), tile, tiles
    behind = torch.stack([(places[0] - 1).clamp(min=0), *places[1:]])
    tile, key, tiles = _tiles(replace(layout, frames=layout.frames - 1), behind, block)
    _, first_key, _ = _tiles(replace(layout, frames=1), torch.stack([torch.zeros_like(places[0]), *places[1:]]), block)
    key = torch.where(places[0] == 0, first_key - 2 * layout.tokens, key)
    return placeless_together(layout, key), tile, tiles


@functools.lru_cache(maxsize=LAYOUTS)
def _lists(policy: Tiles, layout: TokenLayout, block: int, device: torch.device) -> Lists:
    order, tile, tiles = _placed(layout, block, policy.first_frame)
    forced, whole = kept_in_order(layout, order, block, policy.first_frame)
    count = len(whole)
    placed = ~placeless(layout)[order]
    parts = torch.stack([torch.arange(layout.tokens) // block, tile[order]])[:, placed].unique(dim=1)
    middle = torch.cartesian_prod(*(torch.arange(n) for n in tiles)).view(-1, 3)  # of each tile
    if policy.window:
        seen = torch.ones(len(middle), len(middle), dtype=torch.bool)
        for axis, extent, window in zip(middle.unbind(1), tiles, policy.window, strict=True):
            first = (axis - window // 2).clamp(max=extent - window).clamp(min=0)[:, None]
            seen &= (axis >= first) & (axis < first + window)
        apart = _between_blocks((~seen).double(), parts, count)
        kept = (apart == 0) | forced | whole[:, None] | torch.eye(count, dtype=torch.bool)
    else:
        steps = (middle[:, None] - middle).abs().double() / torch.tensor(tiles, dtype=torch.float64)
        apart = _between_blocks(steps.amax(dim=2) + TIE * steps.square().sum(dim=2), parts, count)
        nearer = apart.argsort(dim=1, stable=True).argsort(dim=1)  # blocks that are nearer: every row has as many
        kept = nearest(nearer, forced, whole, policy.density)
    return Lists.of(kept[None], device)


def _between_blocks(apart: Tensor, parts: Tensor, count: int) -> Tensor:
    """[count, count] of apart [tiles, tiles]: the least between any two tiles that have a part in the blocks.

    `parts` int64 [2, P] are pairs of a block and a tile that has a part in it; a block without is infinitely far.
    """
    block, tile = parts
    rows = torch.full((count, len(apart)), torch.inf, dtype=apart.dtype)
    rows.scatter_reduce_(0, block[:, None].expand(-1, len(apart)), apart[tile], "amin")
    found = torch.full((count, count), torch.inf, dtype=apart.dtype)
    return found.scatter_reduce_(1, block.expand(count, -1), rows[:, tile], "amin")
