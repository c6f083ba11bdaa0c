"""The words that attention and its policies share: what the tokens are, which call it is, which blocks are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quant_runtime.in_place import taken
from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.kernels.block_map import pool
from quant_runtime.kernels.blocks_by_mass import likeness

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


@functools.lru_cache(maxsize=LAYOUTS)
def grid(layout: TokenLayout) -> Tensor:
    """int64 [3, tokens] on the CPU, not to be written to: frame, row and column of each token, zeros for placeless."""
    places = torch.zeros(3, layout.tokens, dtype=torch.int64)
    extents = (layout.frames, layout.height, layout.width)
    places[:, ~placeless(layout)] = torch.cartesian_prod(*(torch.arange(n) for n in extents)).view(-1, 3).T
    return places


def placeless_together(layout: TokenLayout, key: Tensor) -> Tensor:
    """int64 [tokens]: the tokens of the grid by ascending key [tokens], int64; beside them the others in their order.

    These stay behind where text alone is and stands there; else they go in front, special tokens from all frames.
    """
    free, behind = placeless(layout), not (layout.special or layout.text_first)
    group = free.long() if behind else (~free).long()
    by_key = torch.where(free, 0, key).argsort(stable=True)
    return by_key[group[by_key].argsort(stable=True)]


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
    branch: int = 0  # calls of this layer in this step before it: where one guides another, each has a number
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
        return _listed(key_mask(self.kept, self.counts, self.keys), self.counts)


@dataclass(frozen=True)
class PackedBlocks:
    """What is kept, in a bit for each block: to be put by."""

    bits: Tensor  # uint8 [B, H, rows, ceil(keys / 8)], the first block of eight in the lowest bit
    counts: Tensor
    block_q: int
    block_k: int
    keys: int

    @classmethod
    def of(cls, blocks: Blocks) -> PackedBlocks:
        mask = torch.nn.functional.pad(key_mask(blocks.kept, blocks.counts, blocks.keys), (0, -blocks.keys % 8))
        bits = (mask.unflatten(3, (-1, 8)) << _bits(mask.device)).sum(dim=4, dtype=torch.uint8)
        return cls(bits, blocks.counts.clone(), blocks.block_q, blocks.block_k, blocks.keys)

    def take(self, other: PackedBlocks) -> bool:
        """Whether it keeps what `other` does now, where it lay: of blocks of other sizes or shapes nothing."""
        sizes = [(its.block_q, its.block_k, its.keys) for its in (self, other)]
        return sizes[0] == sizes[1] and taken((self.bits, self.counts), (other.bits, other.counts))

    def blocks(self) -> Blocks:
        """Of each row all blocks are listed, those that are kept first."""
        mask = (self.bits[..., None] >> _bits(self.bits.device) & 1).flatten(3)[..., : self.keys].bool()
        return Blocks(_listed(mask, self.counts), self.counts, self.block_q, self.block_k, self.keys)


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _listed(kept: Tensor, counts: Tensor) -> Tensor:
    """int32 [B, H, rows, keys] of a mask: of each row first what is kept, then the other blocks, both ascending."""
    every = torch.arange(kept.shape[3], dtype=torch.int32, device=kept.device)
    before = kept.cumsum(dim=3, dtype=torch.int32)  # and itself
    place = torch.where(kept, before - 1, counts[..., None] + every - before).long()
    return torch.empty(kept.shape, dtype=torch.int32, device=kept.device).scatter_(3, place, every.expand(kept.shape))


@dataclass(frozen=True)
class Seen:
    """What a policy may look at of a call's queries and keys: blocks of `block` tokens in their places.

    Means float32 [B, H, ceil(N / block), D] and likenesses (kernels/blocks_by_mass.py) float32 [B, H, ceil(N / block)],
    of queries and of keys, are worked out for those that ask.
    """

    heads: tuple[int, int]  # B and H
    device: torch.device
    block: int
    means: Callable[[], tuple[Tensor, Tensor]]
    alike: Callable[[], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block: int) -> Seen:
        """Of floats [B, H, N, D]."""

        def alike() -> tuple[Tensor, Tensor]:
            return likeness(q, block), likeness(k.float() - k.mean(dim=2, keepdim=True, dtype=torch.float32), block)

        return cls((q.shape[0], q.shape[1]), q.device, block, lambda: (pool(q, block), pool(k, block)), alike)


class Policy(Hashable, Protocol):
    """A frozen dataclass: its fields are its knobs."""

    @property
    def block(self) -> int:
        """Tokens of a block, where the kernel leaves it open."""
        ...

    def orders(self, layout: TokenLayout, block: int) -> Tensor | None:
        """In which order tokens go into blocks of `block`: int64 [ways, tokens] on the CPU; None for the one they have.

        Of several ways each head has one: such a policy is a Choosing one. Else there is one way, for all heads.
        """
        ...

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        """What this call keeps; None for everything. `ways` is what the policy chose, None for one that does not."""
        ...


class Look(Protocol):
    """A call's operands before they have places, for those who choose between ways to place them."""

    @property
    def heads(self) -> tuple[int, int]:
        """B and H."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def block(self) -> int: ...

    def head(self, h: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of head h in float32: queries [B, R, D] of the tokens `queries`, int64 [R]; keys and values [B, N, D]."""
        ...


@runtime_checkable
class Choosing(Policy, Protocol):
    """A policy with several ways. What it chooses is kept by the AttentionState, and asked for again at refreshes."""

    def choose(self, look: Look, call: AttentionCall) -> Tensor:
        """The way of each head: int64 [B, H] on the device."""
        ...

    def settled(self, votes: Mapping[int, Sequence[Tensor]]) -> Policy:
        """One that no longer chooses, by what it chose for each layer, ways [B, H]. ValueError if that is nothing."""
        ...


def every_block(q: Tensor, k: Tensor, block: int) -> Blocks:
    """All blocks of all rows: dense attention, as lists."""
    rows, keys = -(-q.shape[2] // block), -(-k.shape[2] // block)
    kept = torch.arange(keys, dtype=torch.int32, device=q.device).expand(*q.shape[:2], rows, keys)
    counts = torch.full((*q.shape[:2], rows), keys, dtype=torch.int32, device=q.device)
    return Blocks(kept, counts, block, block, keys)
