"""Which attention blocks are kept. One policy, one file; POLICIES is all of them."""

from __future__ import annotations

from quant_runtime.sparsity.base import Policy
from quant_runtime.sparsity.dense import Dense
from quant_runtime.sparsity.topk import TopK

POLICIES: dict[str, type[Policy]] = {
    "dense": Dense,
    "topk": TopK,
}
