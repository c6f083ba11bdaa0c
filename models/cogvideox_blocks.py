"""CogVideoX's blocks in 8 bits from end to end, where all their layers are quantized and the plan has attention so.

Text and video share every layer and differ in modulation alone: one tensor, text in front, goes through the block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.packed_blocks import Streams, added, all_quantized, attended, bent, normed, runs_packed
from quant_runtime.kernels.pack_heads import Pair


class Block:
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
        image_rotary_emb: Pair | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            self.streams.forget()
        if not runs_packed(self.block.attn1):
            text, video = self.streams.settled_pair(encoder_hidden_states, hidden_states)
            video, text = type(self.block).forward(self.block, video, text, temb, image_rotary_emb, attention_kwargs)
        else:
            rope = None if image_rotary_emb is None else self.streams.rope(image_rotary_emb, hidden_states)
            text, video = self.packed(encoder_hidden_states, hidden_states, temb, rope)
        if not self.followed:
            self.streams.close()
        return video, text

    def packed(self, text: Tensor, video: Tensor, temb: Tensor, rope: Pair | None) -> tuple[Tensor, Tensor]:
        """The block in 8 bits: text and video, or what lacks no more than the next block adds."""
        block, attn, tokens = self.block, self.block.attn1, text.shape[1]
        x = self.streams.joined(text, video)
        shift, scale, gate = modulation(block.norm1, temb)
        y, its_gate = self.streams.owed(x)
        rows, x = normed(attn.fused_qkv, x, shift, scale, y, its_gate, block.norm1.norm.eps, tokens)
        qkv = attn.fused_qkv.product(rows, x.dtype).view(*x.shape[:2], -1)
        norm, bias = (attn.norm_q.weight, attn.norm_k.weight), (attn.norm_q.bias, attn.norm_k.bias)
        out = attended(attn, qkv, norm, attn.norm_q.eps, rope, bias=bias)

        shift, scale, last_gate = modulation(block.norm2, temb)
        proj = block.ff.net[0].proj
        rows, x = normed(proj, x, shift, scale, attn.to_out[0](out), gate, block.norm2.norm.eps, tokens)
        y = bent(block.ff.net[2], proj.product(rows, x.dtype)).view_as(x)
        if self.followed:
            self.streams.owe(x, y, last_gate, tokens)
        else:
            x = added(x, y, last_gate, tokens)
        return self.streams.split(x, tokens)


def pack_blocks(network: Any) -> None:
    """From now on the blocks of a CogVideoX network, whose projections have been fused, run so where they can."""
    streams = Streams()
    before: Block | None = None
    for block in network.transformer_blocks:
        made: Block | None = None
        norms = (block.norm1.norm, block.norm2.norm, block.attn1.norm_q, block.attn1.norm_k)
        plain = all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        if hasattr(block.attn1, "fused_qkv") and plain and all_quantized(block):
            made = block.forward = Block(block, streams)
            made.first = before is None
        if before is not None:
            before.followed = made is not None
        before = made


def modulation(norm: Any, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate of diffusers' CogVideoXLayerNormZero, float32 [B, 2, C], the text's in front.

    Weight and bias of its norm are in shift and scale.
    """
    both = norm.linear(norm.silu(temb)).float().unflatten(1, (2, 3, -1)).flip(1)  # it has the video's in front
    shift, scale, gate = both.unbind(2)
    factor = 1 + scale
    return shift + factor * norm.norm.bias, factor * norm.norm.weight - 1, gate
