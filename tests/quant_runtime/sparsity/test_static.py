import pytest
import torch

from quant_runtime.sparsity.base import Seen
from quant_runtime.sparsity.static import Lists, nearest

NONE = torch.zeros(40, dtype=torch.bool)


def steps(rows=40):
    place = torch.arange(rows, dtype=torch.float64)
    return (place[:, None] - place).abs()


@pytest.mark.parametrize("density", [0.03, 0.1, 0.15, 0.25, 0.5, 0.99, 1.0])
def test_as_many_pairs_are_kept_as_the_density_says_and_they_are_the_nearest(density):
    kept, apart = nearest(steps(), NONE, NONE, density), steps()
    assert int(kept.sum()) == round(density * 1600)
    border = apart[kept].max()
    assert kept[apart < border].all()


def test_the_pairs_at_the_border_are_shared_out_evenly():
    kept, apart = nearest(steps(), NONE, NONE, 0.15), steps()
    border = int(apart[kept].max())
    partly = kept[apart == border].view(2, -1).any(dim=0)  # pairs of the outermost diagonal
    assert 0.1 < partly.double().mean() < 0.9
    halves = partly[: len(partly) // 2].sum(), partly[len(partly) // 2 :].sum()
    assert abs(int(halves[0]) - int(halves[1])) <= 2


def test_what_is_always_kept_counts_and_may_be_all_there_is():
    forced, whole = NONE.clone(), NONE.clone()
    forced[3], whole[7] = True, True
    kept = nearest(steps(), forced, whole, 0.2)
    assert int(kept.sum()) == 320
    assert kept[:, 3].all()
    assert kept[7].all()
    least = nearest(steps(), forced, whole, 0.01)
    assert torch.equal(least, forced | whole[:, None] | torch.eye(40, dtype=torch.bool))


def test_each_head_has_the_lists_of_its_way(device):
    masks = torch.rand(2, 5, 5) < 0.5
    masks |= torch.eye(5, dtype=torch.bool)
    q = torch.zeros(1, 3, 5 * 16, 8, device=device)
    lists, seen = Lists.of(masks, torch.device(device)), Seen.of(q, q, 16)
    ways = torch.tensor([[1, 0, 1]], device=device)
    found = lists.blocks(seen, ways)
    for h, way in enumerate((1, 0, 1)):
        for row in range(5):
            kept = found.kept[0, h, row, : int(found.counts[0, h, row])].tolist()
            assert kept == masks[way, row].nonzero()[:, 0].tolist()
    only = lists.blocks(seen, None)
    assert only.kept.shape[:3] == only.counts.shape == (1, 3, 5)
    assert only.keys == 5
    assert float(only.density()) == pytest.approx(float(masks[0].double().mean()))
