"""Everything is kept: what sparse attention is held against, and the policy of a model that is only quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quant_runtime.sparsity.base import AttentionCall, Blocks, Seen, TokenLayout


@dataclass(frozen=True)
class Dense:
    block: ClassVar[int] = 64

    def orders(self, layout: TokenLayout, block: int) -> None:
        return None

    def blocks(self, seen: Seen, call: AttentionCall, ways: Tensor | None) -> Blocks | None:
        return None
