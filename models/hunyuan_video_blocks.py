"""HunyuanVideo's blocks in 8 bits from end to end: norm, residual and GELU are rounded where they are computed;
queries, keys and values are normalized, turned and packed in one pass.

They answer what diffusers' blocks of QuantLinears answer, up to the roundings to 16 bits in between, which they leave
out. A block runs so where all its linear layers are quantized and the plan has this attention call packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime.attention import PACKED_BLOCK, attend_packed
from quant_runtime.kernels.gelu_quantize import gelu_quantize
from quant_runtime.kernels.norm_quantize import norm_modulate, norm_quantize
from quant_runtime.kernels.pack_heads import pack_heads
from quant_runtime.linear import QuantLinear, Rounded

Rope = tuple[Tensor, Tensor]


class Host:
    """What the blocks of one model hand on to each other within one pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._joint: tuple[Tensor, Tensor, Tensor] | None = None  # video and text, and what both are views of
        self._owed: list[tuple[Tensor, Tensor, Tensor]] = []  # x, y and gate: x is to become x + gate * y
        self._rope: tuple[Tensor, Rope] | None = None  # as diffusers has it, and each angle once

    def joined(self, video: Tensor, text: Tensor) -> Tensor:
        """Both in one tensor [B, N, C]: the block before has left them so, or they are copied."""
        if self._joint is not None and self._joint[0] is video and self._joint[1] is text:
            return self._joint[2]
        return torch.cat([self.settled(video), self.settled(text)], dim=1)

    def split(self, joint: Tensor, text: int) -> tuple[Tensor, Tensor]:
        seen, read = joint.tensor_split([-text], dim=1)
        self._joint = (seen, read, joint)
        return seen, read

    def owe(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        """The next block adds gate * y to x, in the pass over x that it makes anyway."""
        self._owed.append((x, y, gate))

    def owed(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """y and gate, if x lacks something; asked once."""
        for index, (lacking, y, gate) in enumerate(self._owed):
            if lacking is x:
                del self._owed[index]
                return y, gate
        return None, None

    def settled(self, x: Tensor) -> Tensor:
        y, gate = self.owed(x)
        return x if y is None or gate is None else torch.addcmul(x, gate[:, None], y)

    def settled_pair(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """For a block that knows nothing of debts."""
        if self._joint is not None and self._joint[0] is video and self._joint[1] is text:
            return self.split(self.settled(self._joint[2]), text.shape[1])
        return self.settled(video), self.settled(text)

    def rope(self, doubled: Rope) -> Rope:
        if self._rope is None or self._rope[0] is not doubled[0]:
            cos, sin = (t[:, ::2].half().contiguous() for t in doubled)
            self._rope = (doubled[0], (cos, sin))
        return self._rope[1]


class Block:
    """Stands where a block's `forward` stood."""

    def __init__(self, layer: int, block: Any, host: Host) -> None:
        self.layer, self.block, self.host = layer, block, host
        self.followed = False  # by another of these

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Rope | None = None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        model = self.host.model
        call = model.attention.call(self.layer, model.layout)
        if freqs_cis is None or not model.attention.plan.packed(call):
            pair = self.host.settled_pair(hidden_states, encoder_hidden_states)
            whole = (*pair, temb, attention_mask, freqs_cis, *rest)
            seen, read = type(self.block).forward(self.block, *whole)
            return seen, read
        return self.packed(hidden_states, encoder_hidden_states, temb, self.host.rope(freqs_cis))

    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def added(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x + gate * y, or x that lacks it, where the block behind this one sees to that."""
        if not self.followed:
            return torch.addcmul(x, gate[:, None], y)
        self.host.owe(x, y, gate)
        return x

    def attended(self, qkv: Tensor, rope: Rope, others: tuple[Tensor, Tensor] | None) -> Tensor:
        """Self-attention of projections [B, N, 3 C], text last: [B, N, C]."""
        attn, model = self.block.attn, self.host.model
        q, k, v = qkv.unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        norm = (attn.norm_q.weight, attn.norm_k.weight)
        packed = pack_heads(q, k, v, PACKED_BLOCK, norm, others, attn.norm_q.eps, rope)
        out = attend_packed(packed, model.attention.call(self.layer, model.layout), model.attention, qkv.dtype)
        return out.transpose(1, 2).flatten(2)


class DoubleBlock(Block):
    """Video and text have weights of their own."""

    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        block, attn = self.block, self.block.attn
        seen_by = modulation(block.norm1, temb, 6)
        read_by = modulation(block.norm1_context, temb, 6)

        qkv = video.new_empty(len(video), video.shape[1] + text.shape[1], attn.fused_qkv.out_features)
        into = qkv.tensor_split([-text.shape[1]], dim=1)
        video = self._projected(attn.fused_qkv, video, seen_by, into[0])
        text = self._projected(attn.fused_added_qkv, text, read_by, into[1])
        others = (attn.norm_added_q.weight, attn.norm_added_k.weight)
        seen, read = self.attended(qkv, rope, others).tensor_split([-text.shape[1]], dim=1)

        video = self._fed_forward(block.ff, video, attn.to_out[0](seen), seen_by)
        text = self._fed_forward(block.ff_context, text, attn.to_add_out(read), read_by)
        return video, text

    def _projected(self, layer: QuantLinear, x: Tensor, by: tuple[Tensor, ...], into: Tensor) -> Tensor:
        """The norm of x through `layer`, into `into`; and x, with what it lacked."""
        rows, x = normed(layer, x, *by[:2], *self.host.owed(x))
        if into.is_contiguous():
            layer.product(rows, x.dtype, into.flatten(0, 1))
        else:
            into.copy_(layer.product(rows, x.dtype).view_as(into))
        return x

    def _fed_forward(self, ff: Any, x: Tensor, attended: Tensor, by: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, shift, scale, last_gate = by
        rows, x = normed(ff.net[0].proj, x, shift, scale, attended, gate)
        inner = ff.net[0].proj.product(rows, x.dtype)
        return self.added(x, bent(ff.net[2], inner).view_as(x), last_gate)


class SingleBlock(Block):
    """Video and text have one set of weights, and attention and MLP one projection out."""

    def packed(self, video: Tensor, text: Tensor, temb: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        block, x = self.block, self.host.joined(video, text)
        shift, scale, gate = modulation(block.norm, temb, 3)
        rows, x = normed(block.attn.fused_qkv, x, shift, scale, *self.host.owed(x))
        mlp_rows = rows
        if not block.attn.fused_qkv.rounds_like(block.proj_mlp):
            mlp_rows, _ = normed(block.proj_mlp, x, shift, scale)
        qkv = block.attn.fused_qkv.product(rows, x.dtype).view(*x.shape[:2], -1)
        attended = self.attended(qkv, rope, None)
        inner = block.proj_mlp.product(mlp_rows, x.dtype)
        y = bent(block.proj_out, inner, attended.flatten(0, 1)).view_as(x)
        return self.host.split(self.added(x, y, gate), text.shape[1])


def fuse_blocks(model: Any) -> None:
    """From now on the blocks of a HunyuanVideoModel, whose projections have been fused, run so where they can."""
    host, network = Host(model), model.network
    doubles = [(block, DoubleBlock, ("fused_qkv", "fused_added_qkv")) for block in network.transformer_blocks]
    singles = [(block, SingleBlock, ("fused_qkv",)) for block in network.single_transformer_blocks]
    before: Block | None = None
    for layer, (block, kind, projections) in enumerate([*doubles, *singles]):
        made: Block | None = None
        fused = all(hasattr(block.attn, name) for name in projections)
        if fused and not any(isinstance(m, nn.Linear) for m in block.modules()):
            made = block.forward = kind(layer, block, host)
        if before is not None:
            before.followed = made is not None
        before = made


def modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates [B, C] of diffusers' AdaLayerNormZero and AdaLayerNormZeroSingle."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def normed(
    layer: QuantLinear, x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Rounded, Tensor]:
    """The modulated norm of x [B, N, C], or of x + gate * y, as `layer` takes it; and what was normalized."""
    if layer.spec.rotation:
        h, x = norm_modulate(x, shift, scale, y, gate)
        return layer.rounded(h.flatten(0, 1)), x
    bits = layer.spec.format.activation_bits
    q, row_scale, x = norm_quantize(x, shift, scale, y, gate, bits=bits, factor=layer.factor())
    return (q, row_scale), x


def bent(layer: QuantLinear, inner: Tensor, before: Tensor | None = None) -> Tensor:
    """`layer` of GELU(inner) [M, K], or of `before` and GELU(inner) side by side."""
    if layer.spec.rotation:
        real = F.gelu(inner, approximate="tanh")
        return layer(real if before is None else torch.cat([before, real], dim=1))
    rows = gelu_quantize(inner, before, layer.spec.format.activation_bits, layer.factor())
    return layer.product(rows, inner.dtype)
