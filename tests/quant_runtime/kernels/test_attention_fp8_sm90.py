"""On a Hopper alone: no interpreter runs these instructions."""

import pytest
import torch

from quant_runtime.kernels import _cuda, attention_fp8, attention_fp8_sm90
from quant_runtime.kernels.pack_heads import pack_heads
from tests.quant_runtime.kernels.inputs import FP16_ROUNDING, FP32_ROUNDING
from tests.quant_runtime.kernels.test_attention_fp8 import P_ROUNDED, placed, refresh_arguments, residual, shuffled
from tests.support import relative_error

SIZES = tuple(attention_fp8_sm90.PROGRAMS)
SHAPES = [
    (batch, heads, tokens, size, 128)
    for size in SIZES
    for batch, heads, tokens in ((1, 2, 1000), (2, 3, 517), (1, 1, 128), (1, 3, 2333), (4, 50, 517))
]  # at last more than three tiles a program: the third waits for the first one's slot
RAGGED = [shape for shape in SHAPES if shape[2] in (1000, 517) and shape[1] < 50]
SLACK = 0.1  # its weights are relative to another number than the reference's, and fall elsewhere between e4m3's steps


@pytest.fixture(autouse=True)
def _hopper(device):
    if not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")


def run(args, *rest):
    operands, (_, _, *more) = args[:9], args[9:]
    return attention_fp8_sm90.launch(*operands, *more, *rest)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_agrees_with_the_reference(shape, out_dtype, device):
    args = refresh_arguments(shape, device, out_dtype)
    got = run(args, None, None, None)
    assert relative_error(got, attention_fp8.reference(*args, None, None)) < P_ROUNDED
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", RAGGED)
def test_a_residual_is_added_before_the_answer_is_rounded(shape, dtype, device):
    args, its = refresh_arguments(shape, device), residual(shape, device, dtype)
    want = run(args, None, None, None) + attention_fp8.unpacked_residual(*its)
    assert relative_error(run(args, *its, None), want) < FP32_ROUNDING
    half = list(args)
    half[11] = torch.float16
    assert relative_error(run(half, *its, None), want) < FP16_ROUNDING


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("size", SIZES)
def test_answers_go_to_the_tokens_of_their_places_and_what_is_added_lies_there(shared, dtype, size, device):
    shape = (2, 3, 517, size, 128)
    args, tokens = refresh_arguments(shape, device), shuffled(shape, device, shared)
    added, scale = (None, None) if dtype is None else residual(shape, device, dtype)
    want = run(args, None, None, None)
    if added is not None:
        want = want + placed(attention_fp8.unpacked_residual(added, scale), tokens)
    assert relative_error(placed(run(args, added, scale, tokens), tokens), want) < FP32_ROUNDING


@pytest.mark.parametrize("size", SIZES)
def test_a_row_without_blocks_answers_zero_and_what_is_not_finite_shows(size, device):
    args = list(refresh_arguments((1, 2, 1000, size, 128), device))
    args[4] = args[4].clone()
    args[4][0, 0, 0] = float("nan")  # the scale of the first block of keys of one head
    out = run(args, None, None, None)
    assert not out[:, :, 128:256].any(), "row 1 of the lists is empty"
    assert out[0, 0, :128].isnan().all(), "row 0 sees every block"
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_padding_behind_the_last_key_does_not_matter_even_where_all_scores_are_nothing(size, device):
    args = list(refresh_arguments((1, 2, 1000, size, 128), device))
    args[0] = torch.zeros_like(args[0])
    before = run(args, None, None, None)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, :, 1000:] = 127
    args[2].view(torch.uint8)[..., attention_fp8.slots(1024) >= 1000] = 0x77  # 240
    assert torch.equal(run(args, None, None, None), before)


@pytest.mark.parametrize("growth", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
def test_scores_that_grow_from_block_to_block_are_followed(growth, size, device):
    """What is largest so far changes little at every block, or much: weights stay below e4m3's top."""
    q, k, v = torch.randn(3, 1, 2, 2000, size, device=device)
    k = k * 0.1 + q.mean(dim=2, keepdim=True) * growth * torch.linspace(0, 1, 2000, device=device)[:, None]
    q = q + 5 * q.mean(dim=2, keepdim=True)
    args = all_kept(q, k, v)
    assert relative_error(run(args, None, None, None), attention_fp8.reference(*args, None, None)) < SLACK


def all_kept(q, k, v):
    packed = pack_heads(q, k, v, 128)
    rows = -(-q.shape[2] // 128)
    kept = torch.arange(rows, dtype=torch.int32, device=q.device).expand(*q.shape[:2], rows, rows)
    counts = torch.full((*q.shape[:2], rows), rows, dtype=torch.int32, device=q.device)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    return *operands, kept, counts, q.shape[2], 128, 128, torch.float32, q.shape[3] ** -0.5


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_runs_there(size, device):
    args = refresh_arguments((1, 2, 1000, size, 128), device, torch.bfloat16)
    assert torch.equal(attention_fp8.attention_fp8(*args), run(args, None, None, None))
