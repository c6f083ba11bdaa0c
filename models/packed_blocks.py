"""What blocks in 8 bits from end to end have in common: norm, residual and GELU are rounded where they are computed.

A family's own file says how its blocks are made of it. They answer what diffusers' blocks of QuantLinears answer, up to
the roundings to 16 bits in between, which they leave out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime.attention import PACKED_BLOCK, attend_packed
from quant_runtime.kernels.gelu_quantize import gelu_quantize
from quant_runtime.kernels.norm_quantize import norm_modulate, norm_quantize
from quant_runtime.kernels.pack_heads import Pair, pack_heads
from quant_runtime.linear import QuantLinear, Rounded


class Debts:
    """What the blocks of one network hand on to each other within one pass, and forget behind it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """At both ends of a pass: one that was broken off leaves nothing to the next, and none holds memory."""
        self._owed: list[tuple[Tensor, Tensor, Tensor]] = []  # x, y and gate: x is to become x + gate * y
        self._rope: tuple[Tensor, Pair] | None = None  # as diffusers has it, and each angle once

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
        return x if y is None or gate is None else added(x, y, gate)

    def rope(self, doubled: Pair, like: Tensor) -> Pair:
        """Of cos and sin that hold each angle twice, R times D: [R, D / 2], in float16 where `like` has 16 bits."""
        if self._rope is None or self._rope[0] is not doubled[0]:
            dtype = torch.float32 if like.dtype == torch.float32 else torch.float16
            cos, sin = (t.squeeze()[:, ::2].to(dtype).contiguous() for t in doubled)
            self._rope = (doubled[0], (cos, sin))
        return self._rope[1]


def all_quantized(block: nn.Module) -> bool:
    return not any(isinstance(module, nn.Linear) for module in block.modules())


def added(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y of x and y [B, N, C] and gate [B, C]."""
    return torch.addcmul(x, gate[:, None].to(x.dtype), y)


def attended(attn: Any, qkv: Tensor, norm: Pair, eps: float, rope: Pair, others: Pair | None = None) -> Tensor:
    """Self-attention of projections [B, N, 3 C], the tokens that turn first: [B, N, C].

    `attn` has a processor that knows its layer, its model and its network's attention state.
    """
    its = attn.processor
    q, k, v = qkv.unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    packed = pack_heads(q, k, v, PACKED_BLOCK, norm, others, eps, rope)
    out = attend_packed(packed, its.state.call(its.layer, its.model.layout), its.state, qkv.dtype)
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
) -> tuple[Rounded, Tensor]:
    """The modulated norm of x [B, N, C], or of x + gate * y, as `layer` takes it; and what was normalized."""
    if layer.spec.rotation:
        h, x = norm_modulate(x, shift, scale, y, gate, eps)
        return layer.rounded(h.flatten(0, 1)), x
    bits = layer.spec.format.activation_bits
    q, row_scale, x = norm_quantize(x, shift, scale, y, gate, eps, bits, layer.factor())
    return (q, row_scale), x


def bent(layer: QuantLinear, inner: Tensor, before: Tensor | None = None) -> Tensor:
    """`layer` of GELU(inner) [M, K], or of `before` and GELU(inner) side by side."""
    if layer.spec.rotation:
        real = F.gelu(inner, approximate="tanh")
        return layer(real if before is None else torch.cat([before, real], dim=1))
    rows = gelu_quantize(inner, before, layer.spec.format.activation_bits, layer.factor())
    return layer.product(rows, inner.dtype)
