"""For the self-test: what blocks in 8 bits from end to end run besides their layers, in small pieces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from models.packed_blocks import bent, normed
from quant_runtime.attention import PACKED_BLOCK
from quant_runtime.kernels.gelu_quantize import LARGEST_K
from quant_runtime.kernels.pack_heads import pack_heads
from quant_runtime.selftest import HEADS, ROWS, Layer, Needs, Piece, calls, distinct, heads, quantized, uneven


def pieces(needs: Needs, hidden: int, together: bool, device: torch.device) -> Iterator[Piece]:
    """Of a network that is `hidden` channels wide; none where its plan packs no call on this device.

    `together`: queries and keys are normalized over all heads of a token. Else it is by heads, text has weights of its
    own, and projections of video and text fill one tensor.
    """
    made = calls(needs.plan, needs.layout)
    sizes = [
        size for size in sorted(set(needs.head_sizes)) if any(needs.plan.packed(call, size, device) for call in made)
    ]
    for layer in distinct(needs.layers) if sizes else ():
        if layer.inputs == hidden:
            yield Piece(f"a norm of {hidden} channels", partial(_norm, layer, together, needs, device))
        if layer.inputs <= LARGEST_K:
            yield Piece(f"GELU of {layer.inputs} channels", partial(_bend, layer, hidden, needs, device))
    for size in sizes:
        yield Piece(f"norm and rotation of heads of {size}", partial(_turn, size, together, needs, device))


def _norm(layer: Layer, together: bool, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    made = quantized(layer, **kind)
    for tokens in ROWS:
        x, y = (uneven(1, tokens, layer.inputs, **kind) for _ in range(2))
        shift, scale, gate = torch.randn(1, 3 * layer.inputs, **kind).chunk(3, dim=1)
        normed(made, x, shift, scale)
        rows, _ = normed(made, x, shift, scale, y, gate)
        if not together:
            made.product(rows, needs.dtype, torch.empty(tokens, layer.outputs, **kind))


def _bend(layer: Layer, hidden: int, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    made = quantized(layer, **kind)
    for tokens in ROWS:
        bent(made, uneven(tokens, layer.inputs, **kind))
        if layer.inputs > hidden:  # attention and MLP side by side
            bent(made, uneven(tokens, layer.inputs - hidden, **kind), uneven(tokens, hidden, **kind))


def _turn(size: int, together: bool, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    q, k, v = heads(size, needs.layout.tokens, **kind)
    angles = 6 * torch.rand(needs.layout.tokens - needs.layout.text, size // 2, device=device)
    narrow = torch.float32 if needs.dtype == torch.float32 else torch.float16  # as the blocks have them
    rope = angles.cos().to(narrow), angles.sin().to(narrow)
    wide = HEADS * size if together else size
    norm, others = ((torch.rand(wide, **kind) + 0.5, torch.rand(wide, **kind) + 0.5) for _ in range(2))
    pack_heads(q, k, v, PACKED_BLOCK, norm, None, 1e-6, rope)
    if not together:
        pack_heads(q, k, v, PACKED_BLOCK, norm, others, 1e-6, rope)
