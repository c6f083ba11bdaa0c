import math

import pytest
import torch

from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.kernels.attention_blocks import key_mask
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import SPATIAL, TEMPORAL, Bands, _lists
from quant_runtime.sparsity.base import AttentionCall, TokenLayout, grid

CPU = torch.device("cpu")
LARGE = TokenLayout(9, 12, 20)  # 2160 tokens
HUNYUAN = TokenLayout(16, 45, 80, text=256)  # 720p, 61 frames
WAN = TokenLayout(21, 45, 80)  # 720p, 81 frames


def lists_of(policy, layout, block=64):
    lists = _lists(policy, layout, block, CPU)
    return key_mask(lists.kept[None], lists.counts[None], lists.counts.shape[1])[0], lists


@pytest.mark.parametrize("density", [0.15, 0.25, 0.4])
@pytest.mark.parametrize(("layout", "block"), [(LARGE, 64), (HUNYUAN, 128), (WAN, 128)])
@pytest.mark.parametrize("first_frame", [False, True])
def test_the_density_asked_for_is_the_density_that_runs(density, layout, block, first_frame):
    _, lists = lists_of(Bands(density, first_frame=first_frame), layout, block)
    found = lists.counts.double().mean(dim=1) / lists.counts.shape[1]
    assert (found - density).abs().max() < 0.01 * density, "to a hundredth of it, the first frame included"


@pytest.mark.parametrize("density", [0.15, 0.25])
@pytest.mark.parametrize(("layout", "frames"), [(HUNYUAN, {0.15: 1.18, 0.25: 2.07}), (WAN, {0.15: 1.64, 0.25: 2.81})])
def test_the_band_is_as_wide_as_the_paper_has_it(density, layout, frames):
    """w = L (1 - sqrt(1 - s')), s' = s - 2 ctx / L: the values are those of Sparse-VideoGen's own sizes, in frames."""
    tokens = layout.tokens
    left = density - 2 * layout.text / tokens
    width = tokens * (1 - math.sqrt(1 - left))
    assert width / (layout.height * layout.width) == pytest.approx(frames[density], abs=0.01)
    seen, _ = lists_of(Bands(density), layout, 128)
    middle = seen.shape[1] // 2
    for way in (SPATIAL, TEMPORAL):
        row = seen[way, middle, : layout.frames * layout.height * layout.width // 128].nonzero()[:, 0] - middle
        assert abs(int(row.max()) * 128 - width) < 128, "to a block"
        assert abs(int(row.min()) * 128 + width) < 128


def test_a_temporal_head_lies_patch_by_patch_and_a_spatial_one_frame_by_frame():
    spatial, temporal = Bands().orders(TokenLayout(3, 1, 2, text=2), 64)
    assert spatial.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert temporal.tolist() == [0, 2, 4, 1, 3, 5, 6, 7]
    _, first = Bands(first_frame=True).orders(TokenLayout(3, 1, 2, text=2, text_first=True), 64)
    assert first.tolist() == [0, 1, 2, 3, 4, 6, 5, 7], "text, the first frame, then patch by patch"
    spatial, temporal = Bands().orders(TokenLayout(2, 1, 2, special=1), 64)
    assert (spatial.tolist(), temporal.tolist()) == ([0, 3, 1, 2, 4, 5], [0, 3, 1, 4, 2, 5])


def test_beside_the_first_frame_its_rows_look_along_time_too():
    """In the temporal order they lie in front, and see the blocks in which their own patches are."""
    policy = Bands(0.4, block=16, first_frame=True)
    seen, _ = lists_of(policy, LARGE, 16)
    order = policy.orders(LARGE, 16)[TEMPORAL]
    block_of = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) // 16)
    patches = 12 * 20
    for patch in (0, 100, 239):
        later = block_of[patch + patches * torch.arange(1, 9)]
        assert seen[TEMPORAL, block_of[patch], later].all()


def qkv(layout, device, kinds, sharp=6.0, size=16):
    """Heads whose queries find the keys of their frame ('s'), or of their patch ('t'): each has a direction."""
    frame, row, column = grid(layout).to(device)
    ids = {"s": frame, "t": row * layout.width + column}
    q, k = torch.randn(2, 1, len(kinds), layout.tokens, size, device=device).unbind(0)
    for h, kind in enumerate(kinds):
        directions = torch.nn.functional.normalize(torch.randn(int(ids[kind].max()) + 1, size, device=device), dim=1)
        for x in (q, k):
            x[0, h] = 0.3 * x[0, h] + sharp * directions[ids[kind]]
    return q, k, torch.randn(1, len(kinds), layout.tokens, size, device=device)


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("pv_bits", [8, 16])
@pytest.mark.parametrize("text", [0, 70])
def test_a_head_gets_the_pattern_that_it_has(first_frame, pv_bits, text, device):
    layout = TokenLayout(9, 12, 20, text=text)
    q, k, v = qkv(layout, device, "stts", size=32)
    state = AttentionState(AttentionPlan(Bands(0.25, first_frame=first_frame), pv_bits=pv_bits))
    attend(q, k, v, layer=0, layout=layout, state=state)
    assert state._ways[0, 0].tolist() == [[SPATIAL, TEMPORAL, TEMPORAL, SPATIAL]]
    assert state.density().packed == (1.0 if pv_bits == 8 else 0.0)


def test_a_choice_is_kept_for_each_layer_and_branch_until_the_state_starts_anew(device):
    spatial, temporal = (qkv(LARGE, device, kinds) for kinds in ("ss", "tt"))
    state = AttentionState(AttentionPlan(Bands(0.25)))
    state.start(3)

    def step(number, *given):
        state.at(number)
        for operands in given:
            attend(*operands, layer=0, layout=LARGE, state=state)
        return [state._ways[0, branch].flatten().tolist() for branch in range(len(given))]

    assert step(0, spatial, temporal) == [[0, 0], [1, 1]]
    assert step(1, temporal, spatial) == [[0, 0], [1, 1]], "the second is the other branch still"
    state.start(3)
    assert step(0, temporal, spatial) == [[1, 1], [0, 0]]


def test_a_refresh_chooses_again(device):
    spatial, temporal = (qkv(LARGE, device, kinds) for kinds in ("ss", "tt"))
    state = AttentionState(AttentionPlan(Bands(0.25), residual=Residual(1, order=1)))
    state.start(6)
    chosen = []
    for number in range(4):
        state.at(number)
        refresh = state.call(0, LARGE).refresh
        attend(*(spatial if number == 0 else temporal), layer=0, layout=LARGE, state=state)
        chosen.append((refresh, state._ways[0, 0].flatten().tolist()))
    assert chosen == [(True, [0, 0]), (False, [0, 0]), (True, [1, 1]), (False, [1, 1])]


class Blind:
    """A Look that must not be used."""

    heads, device, block = (2, 3), CPU, 64

    def head(self, h, queries):
        raise AssertionError("a table chooses nothing")


def test_a_table_takes_the_place_of_the_choice():
    policy = Bands(table=("sts", "", "ttt"))
    assert policy.choose(Blind(), AttentionCall(0, 0, 1, LARGE)).tolist() == [[0, 1, 0]] * 2
    assert policy.choose(Blind(), AttentionCall(2, 0, 1, LARGE)).tolist() == [[1, 1, 1]] * 2
    for layer in (1, 3):
        with pytest.raises(AssertionError, match="a table chooses nothing"):
            policy.choose(Blind(), AttentionCall(layer, 0, 1, LARGE))
    with pytest.raises(ValueError, match=r"2 letters for layer 0, which has 3 heads"):
        Bands(table=("st",)).choose(Blind(), AttentionCall(0, 0, 1, LARGE))


def test_a_table_is_what_heads_chose_most_often():
    votes = {0: [torch.tensor([[0, 1, 1], [0, 1, 0]]), torch.tensor([[1, 1, 0]])], 2: [torch.tensor([[1, 0, 1]])]}
    assert Bands(0.3).settled(votes) == Bands(0.3, table=("sts", "", "tst"))
    with pytest.raises(ValueError, match="no attention call has chosen"):
        Bands().settled({})


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"density": 0}, "got 0"), ({"block": 48}, "got 48"), ({"rows": 0}, "got 0"), ({"table": ("sx",)}, "'sx'")],
)
def test_fields_out_of_range_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Bands(**fields)
