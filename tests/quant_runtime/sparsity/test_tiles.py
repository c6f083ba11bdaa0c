import pytest
import torch

from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.sparsity.base import TokenLayout, grid
from quant_runtime.sparsity.tiles import Tiles, _lists, tile_shape

CPU = torch.device("cpu")
EVEN = TokenLayout(8, 16, 32)  # whole tiles of 4 x 4 x 4 alone
HUNYUAN = TokenLayout(33, 45, 80, text=256)  # 720p, 129 frames
WAN = TokenLayout(21, 45, 80)


def mask_of(policy, layout, block):
    lists = _lists(policy, layout, block, CPU)
    return key_mask(lists.kept[None], lists.counts[None], lists.counts.shape[1])[0, 0]


@pytest.mark.parametrize(
    ("layout", "block", "shape"),
    [
        (EVEN, 64, (4, 4, 4)),
        (HUNYUAN, 128, (4, 4, 8)),
        (WAN, 128, (4, 4, 8)),
        (TokenLayout(1, 32, 32), 64, (1, 8, 8)),
        (TokenLayout(9, 12, 20), 64, (4, 4, 4)),
    ],
)
def test_a_tile_fills_a_block_and_is_compact(layout, block, shape):
    assert tile_shape(layout, block) == shape


@pytest.mark.parametrize(("layout", "block"), [(EVEN, 64), (HUNYUAN, 128), (WAN, 128), (TokenLayout(5, 6, 9), 16)])
def test_a_block_is_one_tile_as_long_as_there_are_whole_ones(layout, block):
    (order,), shape = Tiles().orders(layout, block), tile_shape(layout, block)
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    whole = 1
    for extent, side in zip((layout.frames, layout.height, layout.width), shape, strict=True):
        whole *= extent // side
    places = grid(layout)[:, order[: whole * block]].view(3, whole, block)
    for axis, side in zip(places, shape, strict=True):
        assert (axis.amax(dim=1) - axis.amin(dim=1) == side - 1).all()
        assert (axis.amin(dim=1) % side == 0).all()


@pytest.mark.parametrize("density", [0.15, 0.25, 0.4])
@pytest.mark.parametrize(("layout", "block"), [(EVEN, 64), (HUNYUAN, 128), (WAN, 128), (TokenLayout(9, 12, 20), 64)])
@pytest.mark.parametrize("first_frame", [False, True])
def test_the_density_asked_for_is_the_density_that_runs(density, layout, block, first_frame):
    found = mask_of(Tiles(density, first_frame=first_frame), layout, block).double().mean()
    assert abs(found - density) < 0.01 * density, "to a hundredth of it, the first frame included"


def test_a_row_sees_the_tiles_around_its_own_and_as_many_at_a_border():
    seen = mask_of(Tiles(0.2), EVEN, 64)  # 2 x 4 x 8 tiles
    counts = seen.sum(dim=1)
    assert counts.max() - counts.min() <= 1
    middle = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(8)).double()
    steps = ((middle[:, None] - middle).abs() / torch.tensor([2.0, 4.0, 8.0])).amax(dim=2)
    for row, its in zip(seen, steps, strict=True):
        assert its[row].max() <= its[~row].min()


def test_a_window_slides_by_tiles_and_stays_inside():
    seen = mask_of(Tiles(window=(1, 3, 3)), EVEN, 64).view(2, 4, 8, 2, 4, 8)
    assert seen.sum(dim=(3, 4, 5)).eq(9).all(), "at a border it is as large as elsewhere"
    assert seen[0, 1, 4, 0, 0:3, 3:6].all()
    assert seen[1, 0, 7, 1, 0:3, 5:8].all()
    assert seen[0, 0, 0, 0, 0:3, 0:3].all()


def test_a_first_frame_lies_in_blocks_of_its_own_and_sees_the_tiles_behind_it():
    layout = TokenLayout(5, 8, 16)  # a first frame in two blocks of 1 x 8 x 8, then 2 x 4 tiles of 4 x 4 x 4
    policy = Tiles(window=(1, 1, 1), first_frame=True)
    (order,) = policy.orders(layout, 64)
    assert grid(layout)[0, order[:128]].eq(0).all()
    assert grid(layout)[2, order[:64]].max() == 7
    seen = mask_of(policy, layout, 64)
    assert seen[:, :2].all()
    assert seen[:2, 2:].tolist() == [[True, True, False, False] * 2, [False, False, True, True] * 2]
    assert torch.equal(seen[2:, 2:], torch.eye(8, dtype=torch.bool))


def test_parts_of_tiles_see_what_any_of_them_sees():
    layout = TokenLayout(4, 4, 9)  # two whole tiles of 4 x 4 x 4, and a column behind them in a block of its own
    seen = mask_of(Tiles(window=(1, 1, 2)), layout, 64)
    assert seen.tolist() == [[True, True, False], [True, True, False], [False, True, True]]
    both = TokenLayout(4, 8, 9)  # the last block has parts of the two tiles behind each row of tiles
    assert mask_of(Tiles(window=(1, 1, 2)), both, 64)[4].tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"density": 2}, "got 2"),
        ({"block": 48}, "got 48"),
        ({"window": (1, 2)}, r"\(1, 2\)"),
        ({"window": (0, 1, 1)}, r"\(0, 1, 1\)"),
    ],
)
def test_fields_out_of_range_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Tiles(**fields)
