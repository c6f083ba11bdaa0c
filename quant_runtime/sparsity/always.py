"""What every policy keeps, whatever it chooses by: text and special tokens, and a first frame where it is told to."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_runtime.sparsity.base import LAYOUTS, TokenLayout, blocks_with, first_frame, placeless

BLOCKS = (16, 32, 64, 128)


def check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is above 0 and at most 1; got {density}")


def check_block(block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block is {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]} tokens; got {block}")


@functools.lru_cache(maxsize=LAYOUTS)
def placeless_first(layout: TokenLayout) -> Tensor | None:
    """int64 [1, tokens]: special tokens, which lie scattered in front of every frame, fill blocks of their own so.

    None for a layout that has none: its tokens keep their order.
    """
    return torch.argsort((~placeless(layout)).to(torch.int8), stable=True)[None] if layout.special else None


def kept_in_order(
    layout: TokenLayout, order: Tensor | None, block: int, with_first_frame: bool
) -> tuple[Tensor, Tensor]:
    """(key blocks that every row keeps, rows that keep all): bool [ceil(tokens / block)] each, on the CPU.

    Blocks of tokens in `order`, int64 [tokens], that hold any of them.
    """
    order = torch.arange(layout.tokens) if order is None else order
    free = placeless(layout)
    always = free | first_frame(layout) if with_first_frame else free
    return blocks_with(always[order], block), blocks_with(free[order], block)


@functools.lru_cache(maxsize=LAYOUTS)
def always_kept(
    layout: TokenLayout, block: int, with_first_frame: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The same in the order of `placeless_first`, on the device; None for no blocks at all."""
    order = placeless_first(layout)
    masks = kept_in_order(layout, None if order is None else order[0], block, with_first_frame)
    forced, whole = (mask.to(device) if bool(mask.any()) else None for mask in masks)
    return forced, whole
