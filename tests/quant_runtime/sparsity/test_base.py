import pytest
import torch

from quant_runtime.sparsity.base import (
    Blocks,
    PackedBlocks,
    TokenLayout,
    blocks_with,
    every_block,
    first_frame,
    grid,
    placeless,
    placeless_together,
)
from tests.quant_runtime.kernels.inputs import lists


def test_a_layout_counts_its_tokens():
    assert TokenLayout(9, 12, 20).tokens == 2160
    assert TokenLayout(8, 16, 16, special=5).tokens == 2088
    assert TokenLayout(2, 2, 2, text=3).tokens == 11


@pytest.mark.parametrize(
    ("layout", "free", "first"),
    [
        (TokenLayout(2, 1, 3), "......", "ooo..."),
        (TokenLayout(2, 1, 2, special=1), "x..x..", "ooo..."),
        (TokenLayout(2, 1, 2, text=3), "....xxx", "oo....."),
        (TokenLayout(2, 1, 2, text=3, text_first=True), "xxx....", "...oo.."),
    ],
)
def test_the_masks_name_the_tokens(layout, free, first):
    assert placeless(layout).tolist() == [mark == "x" for mark in free]
    assert first_frame(layout).tolist() == [mark == "o" for mark in first]


def test_a_block_with_one_such_token_is_such_a_block():
    mask = torch.tensor([False, False, False, True, False, False, True])
    assert blocks_with(mask, 2).tolist() == [False, True, False, True]


def test_every_block_is_dense(device):
    q, k = torch.zeros(2, 3, 70, 8, device=device), torch.zeros(2, 3, 33, 8, device=device)
    blocks = every_block(q, k, 16)
    assert blocks.kept.shape == (2, 3, 5, 3)
    assert blocks.kept[1, 2, 4].tolist() == [0, 1, 2]
    assert float(blocks.density()) == 1.0


def test_all_blocks_are_listed_those_that_are_kept_first(device):
    kept = torch.tensor([[1, 3, 0], [0, 9, 9], [2, 0, 1]], dtype=torch.int32, device=device)  # 9 is behind the count
    counts = torch.tensor([2, 1, 0], dtype=torch.int32, device=device)
    listed = Blocks(kept.expand(2, 3, 3, 3), counts.expand(2, 3, 3), 16, 16, keys=4).all_listed()
    assert listed.dtype == torch.int32
    assert listed[1, 2].tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("keys", [1, 7, 8, 21])
def test_blocks_that_were_put_by_are_the_same_again(keys, device):
    kept, counts = lists(2, 3, 5, keys, device)
    blocks = Blocks(kept, counts, 64, 128, keys)
    packed = PackedBlocks.of(blocks)
    again = packed.blocks()
    assert packed.bits.shape == (2, 3, 5, -(-keys // 8))
    assert (again.block_q, again.block_k, again.keys) == (64, 128, keys)
    assert torch.equal(again.counts, counts)
    assert torch.equal(again.kept, blocks.all_listed())


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 1, 1, -1)])
def test_a_layout_without_tokens_is_refused(wrong):
    with pytest.raises(ValueError, match="TokenLayout"):
        TokenLayout(*wrong)


def test_the_grid_names_frame_row_and_column():
    places = grid(TokenLayout(2, 1, 2, special=1, text=1, text_first=True))
    assert places.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7, [0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        (TokenLayout(2, 1, 2, text=2), [2, 3, 0, 1, 4, 5]),
        (TokenLayout(2, 1, 2, text=2, text_first=True), [0, 1, 4, 5, 2, 3]),
        (TokenLayout(2, 1, 2, special=1), [0, 3, 4, 5, 1, 2]),
        (TokenLayout(2, 1, 1, special=1, text=1), [0, 2, 4, 3, 1]),
    ],
)
def test_tokens_of_the_grid_are_ordered_and_the_others_stay_together(layout, order):
    assert placeless_together(layout, -grid(layout)[0]).tolist() == order
