import torch

from quant_runtime.sparsity.base import AttentionCall, Seen, TokenLayout
from quant_runtime.sparsity.dense import Dense


def test_everything_is_kept_in_its_order():
    layout = TokenLayout(2, 4, 4)
    q = torch.zeros(1, 1, layout.tokens, 8)
    assert Dense().orders(layout, 64) is None
    assert Dense().blocks(Seen.of(q, q, 64), AttentionCall(0, 0, 1, layout), None) is None
