"""What blocks in 8 bits from end to end have in common: norm, residual and GELU are rounded where they are computed.

A family's own file says how its blocks are made of it. They answer what diffusers' blocks of QuantLinears answer, up to
the roundings to 16 bits in between, which they leave out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime.attention import attend_packed
from quant_runtime.kernels.gelu_quantize import gelu_quantize
from quant_runtime.kernels.norm_quantize import by_token, norm_modulate, norm_quantize
from quant_runtime.kernels.pack_heads import Pair, pack_heads
from quant_runtime.linear import QuantLinear, Rounded


class Debts:
    """What the blocks of one network hand on to each other within one pass, and forget behind it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """At both ends of a pass: one that was broken off leaves nothing to the next, and none holds memory."""
        self._owed: list[tuple[Tensor, Tensor, Tensor, int]] = []  # x, y, gate, first: x is to become x + gate * y
        self._rope: tuple[Tensor, Pair] | None = None  # as diffusers has it, and each angle once

    def close(self) -> None:
        """At the end of a pass that was not broken off. RuntimeError where something was owed and never asked for."""
        if self._owed:
            raise RuntimeError(
                "a block was given another tensor than the block before it answered, and what that lacked is lost: "
                "nothing may stand between blocks that run in 8 bits"
            )
        self.forget()

    def owe(self, x: Tensor, y: Tensor, gate: Tensor, first: int = 0) -> None:
        """The next block adds gate * y to x, in the pass over x that it makes anyway."""
        self._owed.append((x, y, gate, first))

    def owed(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """y and gate, if x lacks something; asked once."""
        found = self._asked(x)
        return (None, None) if found is None else found[:2]

    def settled(self, x: Tensor) -> Tensor:
        found = self._asked(x)
        return x if found is None else added(x, *found)

    def _asked(self, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        for index, owed in enumerate(self._owed):
            if owed[0] is x:
                del self._owed[index]
                return owed[1:]
        return None

    def rope(self, doubled: Pair, like: Tensor) -> Pair:
        """Of cos and sin that hold each angle twice, R times D: [R, D / 2], in float16 where `like` has 16 bits."""
        if self._rope is None or self._rope[0] is not doubled[0]:
            cos, sin = (once(t.squeeze()[:, ::2], like) for t in doubled)
            self._rope = (doubled[0], (cos, sin))
        return self._rope[1]


class Streams(Debts):
    """Two streams of tokens that go from block to block as two tensors, one before the other in attention.

    Where they are two views of one, that is remembered.
    """

    def forget(self) -> None:
        super().forget()
        self._joint: tuple[Tensor, Tensor, Tensor] | None = None  # both, and what both are views of

    def joined(self, front: Tensor, behind: Tensor) -> Tensor:
        """Both in one tensor [B, N, C]: the block before has left them so, or they are copied."""
        if self._joint is not None and self._joint[0] is front and self._joint[1] is behind:
            return self._joint[2]
        return torch.cat([self.settled(front), self.settled(behind)], dim=1)

    def split(self, joint: Tensor, at: int) -> tuple[Tensor, Tensor]:
        front, behind = joint.tensor_split([at], dim=1)
        self._joint = (front, behind, joint)
        return front, behind

    def settled_pair(self, front: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """For a block that knows nothing of debts."""
        if self._joint is not None and self._joint[0] is front and self._joint[1] is behind:
            return self.split(self.settled(self._joint[2]), front.shape[1])
        return self.settled(front), self.settled(behind)


def once(turn: Tensor, like: Tensor) -> Tensor:
    """Cosines or sines as pack_heads takes them, where `like` is turned by them."""
    return turn.to(torch.float32 if like.dtype == torch.float32 else torch.float16).contiguous()


def all_quantized(block: nn.Module) -> bool:
    return not any(isinstance(module, nn.Linear) for module in block.modules())


def added(x: Tensor, y: Tensor, gate: Tensor, first: int = 0) -> Tensor:
    """x + gate * y of x and y [B, N, C] and gate [B, C], or [B, 2, C] as norm_quantize has it."""
    return torch.addcmul(x, by_token(gate, x, first).to(x.dtype), y)


def attended(
    attn: Any,
    qkv: Tensor,
    norm: Pair,
    eps: float,
    rope: Pair | None,
    others: Pair | None = None,
    bias: Pair | None = None,
) -> Tensor:
    """Self-attention of projections [B, N, 3 C], in which the tokens of the first frame on turn: [B, N, C].

    `attn` has a processor that knows its layer, its model and its network's attention state.
    """
    its = attn.processor
    q, k, v = qkv.unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    layout = its.model.layout
    pack = partial(pack_heads, norm=norm, others=others, eps=eps, rope=rope, first=layout.first, bias=bias)
    out = attend_packed(q, k, v, its.state.call(its.layer, layout), its.state, pack)
    return out.transpose(1, 2).flatten(2)


def runs_packed(attn: Any) -> bool:
    """Whether the plan has this call of `attn` in 8 bits throughout."""
    its = attn.processor
    call, device = its.state.call(its.layer, its.model.layout), attn.norm_q.weight.device
    return its.state.plan.packed(call, attn.inner_dim // attn.heads, device)


def normed(
    layer: QuantLinear,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    first: int = 0,
) -> tuple[Rounded, Tensor]:
    """The modulated norm of x [B, N, C], or of x + gate * y, as `layer` takes it; and what was normalized."""
    if layer.spec.rotation:
        h, x = norm_modulate(x, shift, scale, y, gate, eps, first)
        return layer.rounded(h.flatten(0, 1)), x
    its = layer.spec.format
    to = (its.activation_bits, layer.factor(), first, its.activation_dtype)
    q, row_scale, x = norm_quantize(x, shift, scale, y, gate, eps, *to)
    return (q, row_scale), x


def bent(layer: QuantLinear, inner: Tensor, before: Tensor | None = None, exact: bool = False) -> Tensor:
    """`layer` of GELU(inner) [M, K], or of `before` and GELU(inner) side by side."""
    if layer.spec.rotation:
        real = F.gelu(inner, approximate="none" if exact else "tanh")
        return layer(real if before is None else torch.cat([before, real], dim=1))
    its = layer.spec.format
    rows = gelu_quantize(inner, before, its.activation_bits, layer.factor(), exact, its.activation_dtype)
    return layer.product(rows, inner.dtype)
