"""HunyuanVideo's blocks in 8 bits throughout, where all their layers are quantized and the plan has attention so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from models.packed_blocks import Streams, added, all_quantized, attended, bent, normed, runs_packed
from quant_runtime.kernels.pack_heads import Pair
from quant_runtime.linear import QuantLinear


class Block(ABC):
    """Stands where a block's `forward` stood."""

    def __init__(self, block: Any, streams: Streams) -> None:
        self.block, self.streams = block, streams
        self.first = False  # none of these is before it
        self.followed = False  # by another of these

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Pair | None = None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            self.streams.forget()
        if freqs_cis is None or not runs_packed(self.block.attn):
            pair = self.streams.settled_pair(hidden_states, encoder_hidden_states)
            seen, read = type(self.block).forward(self.block, *pair, temb, attention_mask, freqs_cis, *rest)
        else:
            rope = self.streams.rope(freqs_cis, hidden_states)
            seen, read = self.packed(hidden_states, encoder_hidden_states, temb, rope)
        if not self.followed:
            self.streams.close()
        return seen, read

    @abstractmethod
    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Pair) -> tuple[Tensor, Tensor]:
        """The block in 8 bits: video and text, or what lacks no more than the next block adds."""

    def added(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x + gate * y, or x that lacks it, where the block behind this one sees to that."""
        if not self.followed:
            return added(x, y, gate)
        self.streams.owe(x, y, gate)
        return x


class DoubleBlock(Block):
    """Video and text have weights of their own."""

    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Pair) -> tuple[Tensor, Tensor]:
        block, attn = self.block, self.block.attn
        seen_by = modulation(block.norm1, temb, 6)
        read_by = modulation(block.norm1_context, temb, 6)

        qkv = video.new_empty(len(video), video.shape[1] + text.shape[1], attn.fused_qkv.out_features)
        into = qkv.tensor_split([-text.shape[1]], dim=1)
        video = self._projected(attn.fused_qkv, video, seen_by, into[0])
        text = self._projected(attn.fused_added_qkv, text, read_by, into[1])
        norm, others = ((q.weight, k.weight) for q, k in (
            (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k),
        ))  # fmt: skip
        out = attended(attn, qkv, norm, attn.norm_q.eps, rope, others)
        del qkv, into  # the widest tensors of the block come next
        seen, read = out.tensor_split([-text.shape[1]], dim=1)

        video = self._fed_forward(block.ff, video, attn.to_out[0](seen), seen_by)
        text = self._fed_forward(block.ff_context, text, attn.to_add_out(read), read_by)
        return video, text

    def _projected(self, layer: QuantLinear, x: Tensor, by: tuple[Tensor, ...], into: Tensor) -> Tensor:
        """The norm of x through `layer`, into `into`; and x, with what it lacked."""
        shift, scale, *_ = by
        rows, x = normed(layer, x, shift, scale, *self.streams.owed(x))
        if into.is_contiguous():
            layer.product(rows, x.dtype, into.flatten(0, 1))
        else:
            into.copy_(layer.product(rows, x.dtype).view_as(into))
        return x

    def _fed_forward(self, ff: Any, x: Tensor, out: Tensor, by: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, shift, scale, last_gate = by
        rows, x = normed(ff.net[0].proj, x, shift, scale, out, gate)
        inner = ff.net[0].proj.product(rows, x.dtype)
        return self.added(x, bent(ff.net[2], inner).view_as(x), last_gate)


class SingleBlock(Block):
    """Video and text have one set of weights, and attention and MLP one projection out."""

    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Pair) -> tuple[Tensor, Tensor]:
        block, attn, x = self.block, self.block.attn, self.streams.joined(video, text)
        shift, scale, gate = modulation(block.norm, temb, 3)
        rows, x = normed(attn.fused_qkv, x, shift, scale, *self.streams.owed(x))
        mlp_rows = rows
        if not attn.fused_qkv.rounds_like(block.proj_mlp):
            mlp_rows, _ = normed(block.proj_mlp, x, shift, scale)
        qkv = attn.fused_qkv.product(rows, x.dtype).view(*x.shape[:2], -1)
        out = attended(attn, qkv, (attn.norm_q.weight, attn.norm_k.weight), attn.norm_q.eps, rope)
        del qkv, rows  # the widest tensors of the block come next
        inner = block.proj_mlp.product(mlp_rows, x.dtype)
        y = bent(block.proj_out, inner, out.flatten(0, 1)).view_as(x)
        return self.streams.split(self.added(x, y, gate), video.shape[1])


def pack_blocks(network: Any) -> None:
    """From now on the blocks of a HunyuanVideo network, whose projections have been fused, run so where they can."""
    streams = Streams()
    doubles = [(block, DoubleBlock, ("fused_qkv", "fused_added_qkv")) for block in network.transformer_blocks]
    singles = [(block, SingleBlock, ("fused_qkv",)) for block in network.single_transformer_blocks]
    before: Block | None = None
    for block, kind, projections in (*doubles, *singles):
        made: Block | None = None
        if all(hasattr(block.attn, name) for name in projections) and all_quantized(block):
            made = block.forward = kind(block, streams)
            made.first = before is None
        if before is not None:
            before.followed = made is not None
        before = made


def modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates [B, C] of diffusers' AdaLayerNormZero and AdaLayerNormZeroSingle."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)
