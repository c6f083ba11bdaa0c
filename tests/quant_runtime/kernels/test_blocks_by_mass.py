import pytest
import torch
from torch import library

from quant_runtime.kernels import blocks_by_mass as op

NEAR = 1e-5  # of a row's mass: sums of some hundred float32 in another order
SHAPES = [(1, 2, 7, 13, 16), (2, 1, 5, 33, 32), (1, 1, 3, 1, 8), (1, 1, 4, 16, 64)]  # batch, heads, rows, blocks, size
TRITON = pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))
VERSIONS = [op.reference, TRITON]


def means(shape, device):
    """One channel in eight is an outlier: some rows are sharp, and some flat."""
    batch, heads, rows, blocks, size = shape
    q, k = torch.randn(batch, heads, rows, size, device=device), torch.randn(batch, heads, blocks, size, device=device)
    k[..., ::8] *= 5
    return q, k


def last(count, device):
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    mask[-1] = True
    return mask


def rows_of(kept, counts):
    return [row[:count] for row, count in zip(kept.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mass", [0.2, 0.9, 0.999])
def test_a_row_keeps_the_fewest_blocks_that_hold_the_mass(version, shape, mass, device):
    q, k = means(shape, device)
    kept, counts = version(q, k, mass, 1, shape[3], None, None, None, None, 0.0)
    assert kept.dtype == counts.dtype == torch.int32
    share = (q.double() @ k.double().mT * shape[4] ** -0.5).softmax(dim=3).flatten(0, 2)
    for row, its in zip(rows_of(kept, counts), share, strict=True):
        assert row == sorted(set(row))
        assert its[row].sum() >= mass - NEAR
        assert its[row].sum() - its[row].min() < mass + NEAR, "without the least of them it is not held"
        assert its[row].min() == its.sort(descending=True).values[len(row) - 1], "the highest are kept"


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mass", [0.3, 0.95])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [(1, 99), (4, 99), (1, 2)])
def test_triton_agrees_with_the_reference(shape, mass, guarded, masked, bounds, device):
    batch, heads, rows, blocks, _ = shape
    masks = (last(blocks, device), last(rows, device)) if masked else (None, None)
    likenesses = torch.rand(batch, heads, rows + blocks, device=device).split([rows, blocks], dim=2)
    guards = likenesses if guarded else (None, None)
    args = (*means(shape, device), mass, *(min(n, blocks) for n in bounds), *masks, *guards, 0.3)
    for got, want in zip(op.launch(*args), op.reference(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_always_kept_counts_first_and_whole_rows_keep_all(version, device):
    q, k = torch.ones(1, 1, 3, 16, device=device), torch.zeros(1, 1, 6, 16, device=device)
    k[0, 0, 5] = 1.0  # e to the 4th as much as another: 0.916 of the row
    forced, whole = torch.zeros(6, dtype=torch.bool, device=device), last(3, device)
    assert rows_of(*version(q, k, 0.9, 1, 6, None, whole, None, None, 0.0)) == [[5], [5], [0, 1, 2, 3, 4, 5]]
    forced[1] = True
    assert rows_of(*version(q, k, 0.9, 1, 6, forced, whole, None, None, 0.0))[0] == [1, 5]
    forced[5] = True
    assert rows_of(*version(q, k, 0.9, 1, 6, forced, whole, None, None, 0.0))[0] == [1, 5], "they hold the mass"
    assert rows_of(*version(q, k, 0.9, 3, 6, forced, whole, None, None, 0.0))[0] == [0, 1, 5], "the floor"
    assert rows_of(*version(q, k, 0.99, 1, 1, forced, whole, None, None, 0.0))[0] == [1, 5], "always, though beyond"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_block_of_tokens_that_are_not_alike_is_kept_and_left_out_of_the_mass(version, device):
    q, k = torch.ones(1, 1, 2, 16, device=device), torch.zeros(1, 1, 5, 16, device=device)
    k[0, 0, 0], k[0, 0, 3] = 5.0, 1.0
    alike = torch.tensor([[[0.1, 0.5, 0.5, 0.5, 0.5]]], device=device)
    found = version(q, k, 0.8, 1, 5, None, None, torch.tensor([[[0.5, 0.1]]], device=device), alike, 0.2)
    assert rows_of(*found) == [[0, 3], [0, 1, 2, 3, 4]], "0 would have held all of it; row 1 is whole"


@pytest.mark.parametrize("version", VERSIONS)
def test_of_equal_scores_the_earlier_block_is_kept_and_a_nan_is_the_lowest(version, device):
    q, k = torch.ones(1, 1, 1, 8, device=device), torch.zeros(1, 1, 5, 8, device=device)
    k[0, 0, 0] = float("nan")
    assert rows_of(*version(q, k, 0.5, 1, 5, None, None, None, None, 0.0)) == [[1, 2]]


def test_a_mass_of_one_is_everything(device):
    q, k = means(SHAPES[1], device)
    kept, counts = op.blocks_by_mass(100 * q, k, 1.0)
    assert counts.eq(33).all()
    assert kept.eq(torch.arange(33, device=device)).all()


def test_likeness_is_the_mean_cosine_of_all_pairs(device):
    x = torch.randn(2, 3, 70, 24, device=device)
    x[:, 0] += 3
    found = op.likeness(x, 32)
    for block, tokens in enumerate(x.split(32, dim=2)):
        cosines = torch.nn.functional.cosine_similarity(tokens[:, :, :, None], tokens[:, :, None], dim=4)
        assert (found[:, :, block] - cosines.mean(dim=(2, 3))).abs().max() < NEAR
    assert found[:, 0].min() > 0.8 > 0.4 > found[:, 1:].max()
    assert not op.likeness(torch.zeros(1, 1, 5, 8, device=device), 16).any(), "no direction is like no other"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mass": 0.0}, "mass=0.0"),
        ({"mass": 1.5}, "mass=1.5"),
        ({"least": 3, "most": 2}, "least=3, most=2"),
        ({"k_means": torch.zeros(1, 1, 5, 8, dtype=torch.float16)}, "torch.float16"),
        ({"forced": torch.ones(3, dtype=torch.bool)}, r"forced is bool \[5\]"),
        ({"q_alike": torch.ones(1, 1, 2)}, "together"),
        ({"q_alike": torch.ones(1, 1, 2), "k_alike": torch.ones(1, 1, 2)}, r"k_alike is float32 \[1, 1, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, named):
    given = {"q_means": torch.zeros(1, 1, 2, 8), "k_means": torch.zeros(1, 1, 5, 8), "mass": 0.5}
    with pytest.raises(ValueError, match=named):
        op.blocks_by_mass(**given | change)


def test_torch_accepts_the_op(device):
    args = (*means(SHAPES[3], device), 0.5, 1, 16, None, None, None, None, 0.0)
    library.opcheck(torch.ops.quant_runtime.blocks_by_mass.default, args)
