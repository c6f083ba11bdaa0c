"""Which attention blocks are kept. One policy, one file; POLICIES is all of them."""

from __future__ import annotations

from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import Policy
from quant_runtime.sparsity.dense import Dense
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP

POLICIES: dict[str, type[Policy]] = {
    "dense": Dense,
    "topk": TopK,
    "topp": TopP,
    "bands": Bands,
    "tiles": Tiles,
}
