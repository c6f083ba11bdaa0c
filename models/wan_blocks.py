"""Wan's blocks in 8 bits from end to end, where all their layers are quantized and the plan has their attention so.

Attention to text and picture is torch's own, of 16-bit queries, keys and values. TI2V-5B, whose modulation is another
for every token, runs diffusers' blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.packed_blocks import Debts, added, all_quantized, attended, bent, normed, runs_packed
from quant_runtime.kernels.pack_heads import Pair

TEXT_TOKENS = 512  # diffusers' attention to text and picture together finds where the text begins by this number


class Block:
    """Stands where a block's `forward` stood."""

    def __init__(self, block: Any, debts: Debts) -> None:
        self.block, self.debts = block, debts
        self.first = False  # none of these is before it
        self.followed = False  # by another of these

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Pair) -> Tensor:
        if self.first:
            self.debts.forget()
        if temb.ndim != 3 or not runs_packed(self.block.attn1):
            x = self.debts.settled(hidden_states)
            out: Tensor = type(self.block).forward(self.block, x, encoder_hidden_states, temb, rotary_emb)
        else:
            rope = self.debts.rope(rotary_emb, hidden_states)
            out = self.packed(hidden_states, encoder_hidden_states, temb, rope)
        if not self.followed:
            self.debts.close()
        return out

    def packed(self, x: Tensor, context: Tensor, temb: Tensor, rope: Pair) -> Tensor:
        block, attn = self.block, self.block.attn1
        shift, scale, gate, last_shift, last_scale, last_gate = (block.scale_shift_table + temb.float()).unbind(1)
        lacking, its_gate = self.debts.owed(x)
        rows, x = normed(attn.fused_qkv, x, shift, scale, lacking, its_gate, block.norm1.eps)
        qkv = attn.fused_qkv.product(rows, x.dtype).view(*x.shape[:2], -1)
        out = attended(attn, qkv, (attn.norm_q.weight, attn.norm_k.weight), attn.norm_q.eps, rope)
        del qkv  # the widest tensors of the block come next

        offset, factor = (t.float().expand(len(x), -1) for t in (block.norm2.bias, block.norm2.weight))
        rows, x = normed(block.attn2.to_q, x, offset, factor - 1, attn.to_out[0](out), gate, block.norm2.eps)
        query = block.attn2.to_q.product(rows, x.dtype).view_as(x)
        seen = _attended_to(block.attn2, query, context)

        proj = block.ffn.net[0].proj
        rows, x = normed(proj, x, last_shift, last_scale, seen, torch.ones_like(gate), block.norm3.eps)
        y = bent(block.ffn.net[2], proj.product(rows, x.dtype)).view_as(x)
        if not self.followed:
            return added(x, y, last_gate)
        self.debts.owe(x, y, last_gate)
        return x


def pack_blocks(network: Any) -> None:
    """From now on the blocks of a Wan network, whose projections have been fused, run so where they can."""
    debts = Debts()
    before: Block | None = None
    for block in network.blocks:
        made: Block | None = None
        if hasattr(block.attn1, "fused_qkv") and isinstance(block.norm2, nn.LayerNorm) and all_quantized(block):
            made = block.forward = Block(block, debts)
            made.first = before is None
        if before is not None:
            before.followed = made is not None
        before = made


def _attended_to(attn: Any, query: Tensor, context: Tensor) -> Tensor:
    """Attention of queries [B, N, C], not normalized yet, to the text, and to the picture where there is one."""
    query = _heads(attn.norm_q(query), attn.heads)
    text = context
    if attn.add_k_proj is not None:
        picture, text = context.tensor_split([-TEXT_TOKENS], dim=1)
    out = _attention(query, attn.norm_k(attn.to_k(text)), attn.to_v(text), attn.heads)
    if attn.add_k_proj is not None:
        out = out + _attention(query, attn.norm_added_k(attn.add_k_proj(picture)), attn.add_v_proj(picture), attn.heads)
    projected: Tensor = attn.to_out[0](out)
    return projected


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    out = F.scaled_dot_product_attention(query, _heads(key, heads), _heads(value, heads))
    return out.transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
