"""For the self-test: what blocks in 8 bits from end to end run besides their layers, in small pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from models.packed_blocks import bent, normed, once
from quant_runtime.attention import AttentionState, attend_packed
from quant_runtime.kernels.gelu_quantize import LARGEST_K
from quant_runtime.kernels.pack_heads import pack_heads
from quant_runtime.selftest import (
    HEADS,
    ROWS,
    STEPS,
    Layer,
    Needs,
    Piece,
    calls,
    distinct,
    heads,
    quantized,
    small,
    uneven,
)


@dataclass(frozen=True)
class Packing:
    """How the blocks of one family do it."""

    together: bool = False  # queries and keys are normalized over all heads of a token
    others: bool = False  # tokens that do not turn have norms of their own; projections of both fill one tensor
    bias: bool = False  # queries and keys go through layer norms, with biases
    two: bool = False  # modulations: of the text in front, and of what is behind it
    exact: bool = False  # GELU, not its tanh form
    narrow: bool = False  # modulations have the dtype of what they modulate, else they are float32
    always: bool = False  # norms and GELU are rounded whatever the plan of the attention is
    all_turn: bool = False  # tokens without a place turn too
    wide: bool = False  # norms of heads, and their biases, are float32


def pieces(needs: Needs, hidden: int, packing: Packing, device: torch.device) -> Iterator[Piece]:
    """Of a network that is `hidden` channels wide; of the attention none where its plan packs no call here."""
    made = calls(needs.plan, needs.layout)
    sizes = [
        size for size in sorted(set(needs.head_sizes)) if any(needs.plan.packed(call, size, device) for call in made)
    ]
    for layer in distinct(needs.layers) if sizes or packing.always else ():
        if layer.inputs == hidden:
            yield Piece(f"a norm of {hidden} channels", partial(_norm, layer, packing, needs, device))
        if layer.inputs <= LARGEST_K:
            yield Piece(f"GELU of {layer.inputs} channels", partial(_bend, layer, hidden, packing, needs, device))
    for size in sizes:
        yield Piece(f"norm and rotation of heads of {size}", partial(_turn, size, packing, needs, device))


def _norm(layer: Layer, packing: Packing, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    made = quantized(layer, **kind)
    for tokens in ROWS:
        x, y = (uneven(1, tokens, layer.inputs, **kind) for _ in range(2))
        shape = (1, 2, 3 * layer.inputs) if packing.two else (1, 3 * layer.inputs)
        dtype = needs.dtype if packing.narrow else torch.float32
        shift, scale, gate = torch.randn(*shape, device=device, dtype=dtype).chunk(3, dim=-1)
        first = tokens // 3 if packing.two else 0
        normed(made, x, shift, scale, first=first)
        rows, _ = normed(made, x, shift, scale, y, gate, first=first)
        if packing.others:
            made.product(rows, needs.dtype, torch.empty(tokens, layer.outputs, **kind))


def _bend(layer: Layer, hidden: int, packing: Packing, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    made = quantized(layer, **kind)
    for tokens in ROWS:
        bent(made, uneven(tokens, layer.inputs, **kind), exact=packing.exact)
        if layer.inputs > hidden:  # attention and MLP side by side
            bent(made, uneven(tokens, layer.inputs - hidden, **kind), uneven(tokens, hidden, **kind), packing.exact)


def _turn(size: int, packing: Packing, needs: Needs, device: torch.device) -> None:
    kind: dict[str, Any] = {"device": device, "dtype": needs.dtype}
    tried = small(needs)
    plan, layout = tried.plan, tried.layout
    drawn = heads(size, tried, **kind)
    q, _, _ = drawn(0)
    turning, first = (layout.tokens, 0) if packing.all_turn else (layout.tokens - layout.text, layout.first)
    angles = 6 * torch.rand(turning, size // 2, device=device)
    wide = HEADS * size if packing.together else size
    of_norms: dict[str, Any] = kind | {"dtype": torch.float32} if packing.wide else kind
    norm, others = ((torch.rand(wide, **of_norms) + 0.5, torch.rand(wide, **of_norms) + 0.5) for _ in range(2))
    bias = (torch.randn(size, **of_norms), torch.randn(size, **of_norms)) if packing.bias else None
    rope = (once(angles.cos(), q), once(angles.sin(), q))
    for its in (None, others) if packing.others else (None,):
        pack = partial(pack_heads, norm=norm, others=its, rope=rope, first=first, bias=bias)
        state = AttentionState(plan)
        state.start(STEPS)
        for one in calls(plan, layout):
            state.at(one.step)
            call = state.call(one.layer, layout)
            if plan.packed(call, size, device):
                attend_packed(*drawn(one.step), call, state, pack)
