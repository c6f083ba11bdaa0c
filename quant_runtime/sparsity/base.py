"""The words that attention and its policies share: what the tokens are, which call it is, which blocks are kept."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant_runtime.kernels.attention_blocks import key_mask

LAYOUTS = 32  # for so many layouts of late, what follows from them is kept: a service sees a few sizes again and again


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of one self-attention call are, in their order.

    `frames` times (`special` tokens, then height * width tokens of the grid, row by row), with `text` tokens after
    them, or before them if `text_first`. Special tokens belong to no place: VGGT's camera and registers, five in front
    of every view.
    """

    frames: int
    height: int
    width: int
    special: int = 0
    text: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or min(self.special, self.text) < 0:
            raise ValueError(f"a layout has at least one token on its grid, and no negative counts; got {self}")

    @property
    def frame_tokens(self) -> int:
        return self.special + self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens + self.text

    @property
    def first(self) -> int:
        """Where the first frame begins."""
        return self.text if self.text_first else 0


@functools.lru_cache(maxsize=LAYOUTS)
def placeless(layout: TokenLayout) -> Tensor:
    """bool [tokens] on the CPU: text and special tokens, which see all and are seen by all. Not to be written to."""
    mask = torch.ones(layout.tokens, dtype=torch.bool)
    frames = mask[layout.first : layout.first + layout.frames * layout.frame_tokens]
    frames.view(layout.frames, layout.frame_tokens)[:, layout.special :] = False
    return mask


@functools.lru_cache(maxsize=LAYOUTS)
def first_frame(layout: TokenLayout) -> Tensor:
    """bool [tokens] on the CPU: the tokens of the first frame. Not to be written to."""
    mask = torch.zeros(layout.tokens, dtype=torch.bool)
    mask[layout.first : layout.first + layout.frame_tokens] = True
    return mask


def blocks_with(mask: Tensor, block: int) -> Tensor:
    """bool [ceil(N / block)] of mask bool [N]: the blocks that hold any such token."""
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % block))
    return padded.view(-1, block).any(dim=1)


@dataclass(frozen=True)
class AttentionCall:
    """Which call it is: what a policy may depend on besides q and k."""

    layer: int
    step: int  # of the generation, from 0
    steps: int
    layout: TokenLayout
    refresh: bool = False  # runs dense, and what its choice of blocks loses is kept for the sparse steps behind it


@dataclass(frozen=True)
class Blocks:
    """What is kept: lists as attention_blocks takes them."""

    kept: Tensor  # int32 [B, H, rows, L]
    counts: Tensor  # int32 [B, H, rows]
    block_q: int
    block_k: int
    keys: int  # key blocks there are

    def density(self) -> Tensor:
        """The kept fraction of key blocks, mean over batch, heads and rows: a scalar on the device, not read back."""
        return self.counts.sum() / (self.counts.numel() * self.keys)

    def all_listed(self) -> Tensor:
        """int32 [B, H, rows, keys]: of each row first what is kept, then the other blocks, both ascending."""
        kept = key_mask(self.kept, self.counts, self.keys)
        behind = self.counts[..., None] + (~kept).cumsum(dim=3) - 1
        place = torch.where(kept, kept.cumsum(dim=3) - 1, behind)
        every = torch.arange(self.keys, dtype=torch.int32, device=kept.device).expand(kept.shape)
        return torch.empty(kept.shape, dtype=torch.int32, device=kept.device).scatter_(3, place, every)


class Policy(Hashable, Protocol):
    """A frozen dataclass: its fields are its knobs."""

    def order(self, layout: TokenLayout) -> Tensor | None:
        """In which order the tokens go into blocks: int64 [tokens] on the CPU, or None for the order they have."""
        ...

    def blocks(self, q: Tensor, k: Tensor, call: AttentionCall) -> Blocks | None:
        """What this call keeps, of q and k [B, H, N, D] in that order; None for everything."""
        ...

    def blocks_by_means(self, q_means: Tensor, k_means: Tensor, call: AttentionCall, block: int) -> Blocks | None:
        """The same, of the means of every `block` queries and keys, float32 [B, H, ceil(N / block), D]."""
        ...


def every_block(q: Tensor, k: Tensor, block: int) -> Blocks:
    """All blocks of all rows: dense attention, as lists."""
    rows, keys = -(-q.shape[2] // block), -(-k.shape[2] // block)
    kept = torch.arange(keys, dtype=torch.int32, device=q.device).expand(*q.shape[:2], rows, keys)
    counts = torch.full((*q.shape[:2], rows), keys, dtype=torch.int32, device=q.device)
    return Blocks(kept, counts, block, block, keys)
