import pytest
import torch

from quant_runtime.kernels import _cuda, attention_fp8, attention_fp8_sm90
from quant_runtime.kernels.attention_fp8 import attention_fp8_lse, merged
from quant_runtime.kernels.pack_heads import pack_heads
from quant_runtime.selftest import JUDGES
from tests.quant_runtime.kernels.inputs import FP16_ROUNDING, FP32_ROUNDING
from tests.quant_runtime.kernels.test_attention_fp8 import P_ROUNDED, SHAPES, limit, placed, refresh_arguments, shuffled
from tests.support import relative_error

SUMS = 0.02  # of a weight: scores become weights as floats that are 1.5 * 2**23 steps too large, which costs bits
ROUNDED_SUMS = 2**-4  # by hand they are of weights in e4m3, and where one key has them all, as far off as it is
HOPPER_SHAPES = [
    (batch, heads, tokens, size, 128)
    for size in attention_fp8_sm90.PROGRAMS
    for batch, heads, tokens in ((1, 2, 1000), (2, 3, 517), (1, 1, 128))
]


def versions(device):
    yield attention_fp8.lse_launch, SHAPES, SUMS
    if _cuda.is_hopper(torch.device(device)):
        yield attention_fp8.lse_launch_hopper, HOPPER_SHAPES, ROUNDED_SUMS


@pytest.mark.skipif(attention_fp8.triton is None, reason="Triton is not installed")
def test_it_is_the_logarithm_of_what_the_weights_sum_to_and_the_answer_is_what_it_was(device):
    for launch, shapes, sums in versions(device):
        for shape in shapes:
            args = refresh_arguments(shape, device)
            out, lse = launch(*args)
            want, want_lse = attention_fp8.lse_reference(*args)
            assert relative_error(out, want) < limit(device)
            assert torch.equal(lse.isneginf(), want_lse.isneginf())
            seen = ~want_lse.isneginf()
            assert bool(seen.all()) == (shape[2] <= shape[4]), "row 1 of the lists is empty"
            assert (lse - want_lse)[seen].abs().max() < sums


@pytest.mark.parametrize("shape", SHAPES)
def test_in_parts_it_is_the_same(shape, monkeypatch):
    monkeypatch.setattr("quant_runtime.kernels.attention_blocks.PART_ELEMENTS", 1)  # a row of blocks at a time
    args = refresh_arguments(shape, "cpu")
    out, lse = attention_fp8.lse_in_parts(*args)
    want, want_lse = attention_fp8.lse_reference(*args)
    assert relative_error(out, want) < FP32_ROUNDING
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    assert torch.allclose(lse, want_lse, atol=1e-4, rtol=FP32_ROUNDING)


@pytest.mark.skipif(attention_fp8.triton is None, reason="Triton is not installed")
def test_it_lies_where_its_token_is(device):
    for launch, shapes, sums in versions(device):
        args, tokens = refresh_arguments(shapes[0], device), shuffled(shapes[0], device, False)
        want, want_lse = launch(*args)
        out, lse = launch(*args, tokens)
        assert relative_error(placed(out, tokens), want) < FP32_ROUNDING
        back = placed(lse[..., None], tokens)[..., 0]
        seen = ~want_lse.isneginf()
        assert (back - want_lse)[seen].abs().max() < sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_answers_over_keys_in_several_places_become_the_answer_over_all(dtype, device):
    """By lists that part the blocks of keys among three, one of whom has none for some queries."""
    size, block, tokens = 64, 64, 64 * 9 - 20
    x = torch.randn(3, 1, 2, tokens, size, device=device)
    packed = pack_heads(*x, block)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    rest = (tokens, block, block, dtype)

    def over(blocks, empty_row=None):
        kept = torch.tensor(blocks, dtype=torch.int32, device=device).expand(1, 2, 9, len(blocks))
        counts = torch.full((1, 2, 9), len(blocks), dtype=torch.int32, device=device)
        if empty_row is not None:
            counts[:, :, empty_row] = 0
        return attention_fp8_lse(*operands, kept, counts, *rest)

    whole, whole_lse = over(list(range(9)))
    parts = [over([0, 2, 5, 8]), over([1, 3]), over([4, 6, 7])]
    out, lse = merged(parts)
    assert out.dtype == dtype
    exact = FP16_ROUNDING if dtype == torch.float16 else FP32_ROUNDING
    assert relative_error(out, whole) < (P_ROUNDED if device == "cuda" else exact), "a GPU rounds weights, each part's"
    assert (lse - whole_lse).abs().max() < SUMS
    with_nothing, _ = merged([over(list(range(9))), over([0, 1], empty_row=2)])
    assert relative_error(with_nothing[:, :, 128:192], whole[:, :, 128:192]) < FP16_ROUNDING
    nothing, nothing_lse = merged([over([0], empty_row=2)] * 2)
    assert not nothing[:, :, 128:192].any()
    assert nothing_lse[:, :, 128:192].isneginf().all()


def test_the_self_test_judges_both_answers(device):
    args = refresh_arguments(SHAPES[0], device)
    want = attention_fp8.lse_reference(*args)
    judge = JUDGES["attention_fp8_lse"]
    assert judge(args, want, want).passes
    out, lse = want
    for wrong in ((1.2 * out, lse), (out, lse + 0.1), (out, torch.full_like(lse, -torch.inf)), (out, lse * torch.nan)):
        assert not judge(args, wrong, want).passes
