import torch

from quant_runtime.sparsity.base import AttentionCall, TokenLayout
from quant_runtime.sparsity.dense import Dense


def test_everything_is_kept_in_its_order():
    layout = TokenLayout(2, 4, 4)
    q = torch.zeros(1, 1, layout.tokens, 8)
    assert Dense().order(layout) is None
    assert Dense().blocks(q, q, AttentionCall(0, 0, 1, layout)) is None
