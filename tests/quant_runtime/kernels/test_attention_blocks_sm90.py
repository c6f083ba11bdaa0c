"""On a Hopper alone: no interpreter runs these instructions."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quant_runtime import selftest
from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.kernels import _cuda, attention_blocks, attention_blocks_sm90
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.quant_runtime.kernels.inputs import lists
from tests.quant_runtime.kernels.test_attention_blocks import VALUES_ROUNDED, arguments
from tests.support import relative_error

SHAPES = [  # batch, heads, queries, keys, size, block_q, block_k
    (1, 2, 1000, 1000, 128, 128, 128),
    (2, 3, 517, 300, 128, 128, 128),
    (1, 1, 5, 5, 128, 128, 128),
    (1, 2, 2333, 2333, 64, 128, 128),
    (2, 3, 300, 517, 64, 128, 128),
    (2, 35, 517, 517, 64, 128, 128),  # more tiles than processors
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _hopper(device):
    if not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")


def run(args):
    q, k, v, kept, counts, _, _, _, _, scale = args
    return attention_blocks_sm90.launch(q, k, v, kept, counts, scale)


def every(batch, heads, rows, blocks, device):
    kept = torch.arange(blocks, dtype=torch.int32, device=device).expand(batch, heads, rows, blocks)
    return kept, torch.full((batch, heads, rows), blocks, dtype=torch.int32, device=device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_reference(shape, dtype, device):
    args = arguments(shape, device, dtype)
    got = run(args)
    assert relative_error(got, attention_blocks.reference(*args)) < VALUES_ROUNDED
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("size", attention_blocks_sm90.SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_on_views_of_a_projection_with_outlier_channels(size, dtype, device):
    x = torch.randn(2, 700, 3, 3, size, device=device)
    x[..., ::64] *= 30
    q, k, v = x.to(dtype).permute(2, 0, 3, 1, 4)
    assert all(_cuda.tiled(its) and not its.is_contiguous() for its in (q, k, v))
    args = (q, k, v, *lists(2, 3, 6, 6, device), 128, 128, None, None, size**-0.5)
    assert relative_error(run(args), attention_blocks.reference(*args)) < VALUES_ROUNDED


@pytest.mark.parametrize("size", attention_blocks_sm90.SIZES)
def test_what_the_copy_engine_does_not_take_is_copied_first(size, device):
    q, k, v = torch.randn(3, 1, 2, 200, size + 1, device=device, dtype=torch.float16)[..., :size].unbind()
    assert not _cuda.tiled(q), "rows at odd places"
    one_head = k[:, :1].expand(1, 2, 200, size)  # read by both
    args = (q, one_head, v, *lists(1, 2, 2, 2, device), 128, 128, None, None, size**-0.5)
    assert relative_error(run(args), attention_blocks.reference(*args)) < VALUES_ROUNDED


@pytest.mark.parametrize("size", attention_blocks_sm90.SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_blocks_kept_is_dense_attention(size, dtype, device):
    q, k, v = torch.randn(3, 2, 3, 777, size, device=device, dtype=dtype)
    got = attention_blocks_sm90.launch(q, k, v, *every(2, 3, 7, 7, device), size**-0.5)
    assert relative_error(got, scaled_dot_product_attention(q.double(), k.double(), v.double())) < VALUES_ROUNDED


def test_a_row_without_blocks_answers_zero_and_what_is_not_a_number_shows(device):
    args = list(arguments(SHAPES[0], device, torch.bfloat16))
    args[0], args[2] = args[0].clone(), args[2].clone()
    args[0][0, 0, 7] = float("nan")
    args[2][0, 1, 0, 0] = float("nan")
    out = run(args)
    assert not out[:, :, 128:256].any(), "row 1 of the lists is empty"
    assert out[0, 0, 7].isnan().all(), "a query"
    assert out[0, 0, :7].isfinite().all()
    assert out[0, 1, :128, 0].isnan().all(), "row 0 sees every block, and so the value"
    assert out[0, 1, :128, 1:].isfinite().all()


def test_keys_that_are_not_kept_do_not_matter(device):
    args = list(arguments(SHAPES[0], device, torch.bfloat16))
    args[3] = torch.arange(8, dtype=torch.int32, device=device).expand(args[3].shape)
    args[4] = args[4].clamp(max=3)  # no row sees more than the first three
    before = run(args)
    unseen = torch.arange(1000, device=device) >= 3 * 128
    args[1] = args[1].masked_fill(unseen[:, None], float("nan"))
    args[2] = args[2].masked_fill(unseen[:, None], float("nan"))
    assert torch.equal(run(args), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", [0.1, 1.0, 30.0])
def test_scores_that_grow_from_block_to_block_are_followed(growth, dtype, device):
    """What is largest so far changes little at every block, or much."""
    q, k, v = torch.randn(3, 1, 2, 2000, 128, device=device)
    k = k * 0.1 + q.mean(dim=2, keepdim=True) * growth * torch.linspace(0, 1, 2000, device=device)[:, None]
    q = q + 5 * q.mean(dim=2, keepdim=True)
    args = (q.to(dtype), k.to(dtype), v.to(dtype), *every(1, 2, 16, 16, device), 128, 128, None, None, 128**-0.5)
    assert relative_error(run(args), attention_blocks.reference(*args)) < VALUES_ROUNDED


@pytest.mark.parametrize("size", [*attention_blocks_sm90.SIZES, 32])
def test_it_is_what_runs_there_and_triton_runs_the_rest(size, device):
    args = arguments((1, 2, 300, 300, size, 128, 128), device, torch.bfloat16)
    want = attention_blocks.launch(*args) if size == 32 else run(args)
    assert torch.equal(attention_blocks.attention_blocks(*args[:7]), want)


def test_the_self_test_tries_it_in_a_plan_of_16_bits(device):
    plan = AttentionPlan(TopK(0.25, block=128), qk_bits=16)
    needs = selftest.Needs((), plan, attention_blocks_sm90.SIZES, TokenLayout(5, 10, 12, text=7), torch.bfloat16)
    report = selftest.run(selftest.pieces(needs, device), device)
    assert (report.verdict, report.versions["attention_blocks"]) == ("passed", attention_blocks.HOPPER)


def test_a_plan_that_keeps_every_block_answers_what_a_dense_one_does(device):
    layout = TokenLayout(4, 10, 16, text=9)
    q, k, v = torch.randn(2, layout.tokens, 3, 3, 128, device=device).bfloat16().permute(2, 0, 3, 1, 4)
    dense, sparse = (
        attend(q, k, v, layer=0, layout=layout, state=AttentionState(plan))
        for plan in (AttentionPlan(), AttentionPlan(TopK(1.0, block=128), qk_bits=16))
    )
    assert relative_error(sparse, dense) < VALUES_ROUNDED
