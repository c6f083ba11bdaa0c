"""Everything is kept: what sparse attention is held against, and the policy of a model that is only quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant_runtime.sparsity.base import AttentionCall, Blocks, TokenLayout


@dataclass(frozen=True)
class Dense:
    def order(self, layout: TokenLayout) -> None:
        return None

    def blocks(self, q: Tensor, k: Tensor, call: AttentionCall) -> Blocks | None:
        return None

    def blocks_by_means(self, q_means: Tensor, k_means: Tensor, call: AttentionCall, block: int) -> Blocks | None:
        return None
