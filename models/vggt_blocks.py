"""VGGT's blocks in 8 bits: norms, residuals, LayerScale and GELU are rounded where they are computed.

Those of the encoder, the frames and the scene, where all their layers are quantized; not the camera head's, which have
a row a view. Attention inside of frames and across them goes from projection to answer in 8 bits where the plan has it
so; elsewhere, as in the encoder, it is what `attn.attend` is.

The network turns channels that lie a quarter of a head apart. The rows of the projection of queries and keys are put in
another order once, such that those two lie side by side, as pack_heads wants them; their products stay what they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.packed_blocks import Debts, added, all_quantized, bent, normed, once
from models.vggt_net import VGGT
from quant_runtime.attention import AttentionState, attend, attend_packed
from quant_runtime.kernels.pack_heads import Pair, pack_heads
from quant_runtime.linear import QuantLinear
from quant_runtime.sparsity.base import TokenLayout


class Planned:
    """A block's `attend`: dense or sparse, as the plan has it for this layer."""

    def __init__(self, layer: int, state: AttentionState) -> None:
        self.layer, self.state = layer, state

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout | None) -> Tensor:
        assert layout is not None
        return attend(q, k, v, layer=self.layer, layout=layout, state=self.state)


class Scene(Debts):
    """What the blocks hand on to each other, and the angles of one view and of all of them."""

    def forget(self) -> None:
        super().forget()
        self._table: Tensor | None = None
        self._turns: dict[int, Pair] = {}

    def turns(self, rope: Pair, frames: int, like: Tensor) -> Pair:
        """Of vggt_net.rope_table, the cosine and sine of each pair [frames * tokens, D / 2], view after view."""
        if self._table is not rope[0]:
            self._table, self._turns = rope[0], {}
        if frames not in self._turns:
            order = neighbours(rope[0].shape[2], rope[0].device)
            cos, sin = (t[:, 0, order[1::2]] for t in rope)  # of a pair the second has the sine as it is
            self._turns[frames] = (once(cos, like).repeat(frames, 1), once(sin, like).repeat(frames, 1))
        return self._turns[frames]


class Block:
    """Stands where a block's `forward` stood: x [n * frames, tokens, C], each run of `layout.frames` one sequence."""

    def __init__(self, block: Any, scene: Scene) -> None:
        self.block, self.scene = block, scene
        self.first = self.last = False  # of these
        self.followed = False  # by another of these, and nothing else reads what this one answers
        self.norms = [(row(norm.bias), row(norm.weight) - 1) for norm in (block.norm1, block.norm2)]
        self.gates = [row(scale.gamma) for scale in (block.ls1, block.ls2)]
        attn = block.attn
        self.turning = isinstance(attn.q_norm, nn.LayerNorm)
        if self.turning:
            size = attn.qkv.out_features // attn.heads // 3
            order = neighbours(size, attn.qkv.qweight.device)
            attn.paired_qkv = paired(attn.qkv, attn.heads, order)
            del attn.qkv  # its rows have another order now, and whoever looks for it by this name shall not find them
            self.weight, self.bias = (
                (getattr(attn.q_norm, name)[order], getattr(attn.k_norm, name)[order]) for name in ("weight", "bias")
            )
            # As the kernel takes them, which would widen them in a launch each.
            self.pack = partial(
                pack_heads, norm=pair_of_floats(self.weight), bias=pair_of_floats(self.bias), eps=attn.q_norm.eps
            )

    def __call__(self, x: Tensor, rope: Pair | None = None, layout: TokenLayout | None = None) -> Tensor:
        if self.first:
            self.scene.forget()
        block, layer = self.block, self.block.attn.paired_qkv if self.turning else self.block.attn.qkv
        y, gate = self.scene.owed(x)
        rows, flat = normed(layer, x.reshape(1, -1, x.shape[2]), *self.norms[0], y, gate, block.norm1.eps)
        out = self.attended(layer.product(rows, x.dtype), x, rope, layout)
        out = block.attn.proj(out)[None]
        rows, flat = normed(block.mlp.fc1, flat, *self.norms[1], out, self.gates[0], block.norm2.eps)
        y = bent(block.mlp.fc2, block.mlp.fc1.product(rows, x.dtype), exact=True)[None]
        if self.followed:
            answer = flat.view_as(x)
            self.scene.owe(answer, y, self.gates[1])
        else:
            answer = added(flat, y, self.gates[1]).view_as(x)
        if self.last:
            self.scene.close()
        return answer

    def attended(self, qkv: Tensor, x: Tensor, rope: Pair | None, layout: TokenLayout | None) -> Tensor:
        """Attention of the projections [n * frames * tokens, 3 C] of x: [n * frames * tokens, C]."""
        attn, frames = self.block.attn, layout.frames if layout else 1
        q, k, v = qkv.view(len(x) // frames, frames * x.shape[1], 3, attn.heads, -1).unbind(2)  # [n, N, H, D]
        its, size = attn.attend, q.shape[3]
        if self.turning and rope is not None and layout is not None and isinstance(its, Planned):
            call, turns = its.state.call(its.layer, layout), self.scene.turns(rope, frames, x)
            if its.state.plan.packed(call, size, x.device):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                pack = partial(self.pack, rope=turns)
                return attend_packed(q, k, v, call, its.state, pack).transpose(1, 2).reshape(-1, x.shape[2])
        if self.turning:
            q, k = (
                nn.functional.layer_norm(t, (size,), self.weight[i], self.bias[i], attn.q_norm.eps)
                for i, t in enumerate((q, k))
            )
            if rope is not None:
                q, k = (turned(t, *self.scene.turns(rope, frames, x)).to(v.dtype) for t in (q, k))
        out = its(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout)
        return out.transpose(1, 2).reshape(-1, x.shape[2])


def pack_blocks(network: VGGT) -> None:
    """From now on the blocks of a VGGT, which lies on its device in its dtype, run so where they can."""
    inside, scene = network.aggregator, Scene()
    chains: list[list[tuple[Any, bool]]] = [[(block, False) for block in inside.patch_embed.blocks], []]
    for index, pair in enumerate(zip(inside.frame_blocks, inside.global_blocks, strict=True)):
        chains[1] += [(block, index in network.config.taps) for block in pair]  # the heads read what these two answer
    made: list[Block] = []
    for chain in chains:
        before: Block | None = None
        for block, read in chain:
            now = Block(block, scene) if all_quantized(block) else None
            if now is not None:
                block.forward = now
                made.append(now)
            if before is not None:
                before.followed = now is not None
            before = None if read else now
    if made:
        made[0].first = made[-1].last = True
    for module in network.modules():
        if isinstance(module, QuantLinear):
            module.hold_floats()


def row(parameter: Tensor) -> Tensor:
    """[C] as norm_quantize takes it: float32 [1, C]."""
    return parameter.detach().float()[None]


def pair_of_floats(pair: Pair) -> Pair:
    return pair[0].detach().float(), pair[1].detach().float()


def neighbours(size: int, device: torch.device) -> Tensor:
    """int64 [D]: channels of a head in the order in which those that turn together lie side by side."""
    return torch.arange(size, device=device).view(2, 2, -1).transpose(1, 2).flatten()


def paired(qkv: QuantLinear, heads: int, order: Tensor) -> QuantLinear:
    """The projection whose queries' and keys' channels have that order in every head."""
    rows = torch.arange(qkv.out_features, device=order.device).view(3, heads, -1)
    rows = torch.cat([rows[:2, :, order], rows[2:]]).flatten()
    made = QuantLinear(qkv.in_features, qkv.out_features, qkv.spec, bias=qkv.bias is not None, device="meta")
    by_output = {"qweight", "weight_scale", "bias"}
    state = {name: tensor[rows] if name in by_output else tensor for name, tensor in qkv.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 x [n, N, H, D], neighbouring channels turned as pairs by the angles of cos and sin [N, D / 2]."""
    turn = torch.complex(cos.float(), sin.float())[:, None]
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(3, (-1, 2))) * turn).flatten(3)
