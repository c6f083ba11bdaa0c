import pytest
import torch
from torch import library

from quant_runtime.kernels import block_map as op

NEAR = 1e-4  # of the largest score: two blocks so close may change places when means are summed in another order
SHAPES = [  # batch, heads, queries, keys, size, block_q, block_k, keep
    (1, 1, 5, 5, 8, 16, 16, 1),
    (2, 2, 100, 130, 24, 32, 16, 3),
    (1, 2, 257, 200, 64, 16, 32, 7),
    (1, 1, 64, 64, 16, 16, 16, 4),
]


def reference(q, k, keep, block_q, block_k, forced, whole):
    return op.choose_reference(op.pool_reference(q, block_q), op.pool_reference(k, block_k), keep, forced, whole)


def launch(q, k, keep, block_q, block_k, forced, whole):
    return op.launch_choose(op.launch_pool(q, block_q), op.launch_pool(k, block_k), keep, forced, whole)


VERSIONS = [reference, pytest.param(launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))]


def inputs(shape, device):
    batch, heads, queries, keys, size, *_ = shape
    q = torch.randn(batch, queries, heads, size, device=device).transpose(1, 2)
    return q, torch.randn(batch, heads, keys, size, device=device)


def means(x, block):
    return torch.stack([part.double().mean(dim=2) for part in x.split(block, dim=2)], dim=2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_blocks_that_score_highest_are_kept_in_order(version, shape, device):
    q, k = inputs(shape, device)
    *_, block_q, block_k, keep = shape
    kept, counts = version(q, k, keep, block_q, block_k, None, None)
    scores = means(q, block_q) @ means(k, block_k).mT
    least = scores.sort(dim=3, descending=True).values[..., keep - 1 : keep]
    assert kept.dtype == counts.dtype == torch.int32
    assert kept.shape == (*scores.shape[:3], keep)
    assert counts.eq(keep).all()
    assert (kept.diff(dim=3) > 0).all()
    assert (scores.gather(3, kept.long()) >= least - NEAR * scores.abs().max()).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_forced_blocks_are_in_every_row_and_whole_rows_keep_all(version, shape, device):
    q, k = inputs(shape, device)
    _, _, queries, keys, _, block_q, block_k, keep = shape
    rows, blocks = -(-queries // block_q), -(-keys // block_k)
    forced = torch.zeros(blocks, dtype=torch.bool, device=device)
    forced[-1] = True
    whole = torch.zeros(rows, dtype=torch.bool, device=device)
    whole[1] = True
    kept, counts = version(q, k, keep, block_q, block_k, forced, whole)
    listed = [row[:count] for row, count in zip(kept.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)]
    for number, row in enumerate(listed):
        assert row[-1] == blocks - 1
        assert row == sorted(set(row))
        assert len(row) == (blocks if number % rows == 1 else keep)


@pytest.mark.parametrize("version", VERSIONS)
def test_of_equal_scores_the_earlier_block_is_kept_and_a_nan_is_the_lowest(version, device):
    q, k = torch.ones(1, 1, 16, 8, device=device), torch.zeros(1, 1, 64, 8, device=device)
    k[0, 0, 0] = float("nan")
    kept, _ = version(q, k, 2, 16, 16, None, None)
    assert kept.flatten().tolist() == [1, 2]


def test_more_blocks_than_there_are_is_all_of_them(device):
    q, k = inputs(SHAPES[3], device)
    kept, _ = op.choose(op.pool(q, 16), op.pool(k, 16), 99)
    assert kept[0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 0}, "keep=0"),
        ({"k_means": torch.zeros(1, 1, 4, 16, dtype=torch.float16)}, r"torch.float16 \[1, 1, 4, 16\]"),
        ({"forced": torch.ones(3, dtype=torch.bool)}, r"forced is bool \[4\]"),
        ({"whole": torch.ones(4)}, r"whole is bool \[4\]; got torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, named):
    pooled = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=named):
        op.choose(**{"q_means": pooled, "k_means": pooled, "keep": 2} | change)
    with pytest.raises(ValueError, match="int8"):
        op.pool(pooled.to(torch.int8), 16)


def test_torch_accepts_the_op(device):
    q, k = inputs(SHAPES[3], device)
    library.opcheck(torch.ops.quant_runtime.pool_blocks.default, (q, 16))
    library.opcheck(torch.ops.quant_runtime.choose_blocks.default, (op.pool(q, 16), op.pool(k, 16), 2, None, None))
