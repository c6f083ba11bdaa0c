import pytest
import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention

from quant_runtime.kernels import attention_blocks as op
from quant_runtime.kernels.quantize_heads import key_center, quantize_heads
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, ROUNDING, TRITON_DTYPES, lists
from tests.support import relative_error

VALUES_ROUNDED = 2**-7  # bfloat16 values: the probabilities, the sums and the answer are each rounded at 2**-9
INT8_SCORES = 0.02  # what rounding q and k to 8 bits does to the answer, on inputs of size one
SHAPES = [  # batch, heads, queries, keys, size, block_q, block_k
    (1, 1, 5, 5, 8, 16, 16),
    (2, 2, 100, 130, 24, 32, 16),
    (1, 2, 70, 200, 64, 16, 64),
    (1, 1, 150, 128, 128, 64, 64),
]


def qkv(batch, heads, queries, keys, size, device, dtype=torch.float32):
    """q and v as a processor has them, [B, N, H, D] in memory; keys with a part in common and outlier channels."""
    q = torch.randn(batch, queries, heads, size, device=device).transpose(1, 2)
    k = torch.randn(batch, heads, keys, size, device=device) + 3 * torch.randn(batch, heads, 1, size, device=device)
    v = torch.randn(batch, keys, heads, size, device=device).transpose(1, 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def arguments(shape, device, dtype=torch.float32, scales=None):
    """All that the op takes, q and k in float, or in int8 with a scale a "token" or a "block"."""
    batch, heads, queries, keys, size, block_q, block_k = shape
    q, k, v = qkv(batch, heads, queries, keys, size, device, dtype)
    kept, counts = lists(batch, heads, -(-queries // block_q), -(-keys // block_k), device)
    q_scale = k_scale = None
    if scales is not None:
        q, q_scale = quantize_heads(q, None, block_q if scales == "block" else 1)
        k, k_scale = quantize_heads(k, key_center(k), block_k if scales == "block" else 1)
    return q, k, v, kept, counts, block_q, block_k, q_scale, k_scale, size**-0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [None, "token", "block"])
def test_the_cpu_version_agrees_with_the_reference(shape, scales):
    args = arguments(shape, "cpu", scales=scales)
    assert relative_error(op.on_cpu(*args), op.reference(*args)) < FP32_ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [None, "token"])
def test_the_cpu_version_agrees_on_values_of_16_bits(dtype, scales):
    args = arguments(SHAPES[3], "cpu", dtype, scales)
    assert relative_error(op.on_cpu(*args), op.reference(*args)) < VALUES_ROUNDED


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [None, "token", "block"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_agrees_with_the_reference(shape, scales, dtype, device):
    args = arguments(shape, device, dtype, scales)
    limit = VALUES_ROUNDED if dtype == torch.bfloat16 else ROUNDING[dtype]
    assert relative_error(op.launch(*args), op.reference(*args)) < limit


@pytest.mark.parametrize(
    "version", [op._op, pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))]
)
@pytest.mark.parametrize("size", [64, 128])
def test_all_blocks_kept_is_dense_attention(version, size, device):
    q, k, v = qkv(2, 2, 100, 130, size, device)
    kept = torch.arange(9, dtype=torch.int32, device=device).expand(2, 2, 7, 9)  # one list for all rows
    counts = torch.full((2, 2, 7), 9, dtype=torch.int32, device=device)
    got = version(q, k, v, kept, counts, 16, 16, None, None, size**-0.5)
    assert relative_error(got, scaled_dot_product_attention(q.double(), k.double(), v.double())) < FP32_ROUNDING


def test_8_bit_scores_stay_close_to_full_precision_and_centred_keys_bring_them_closer(device):
    q, k, v = qkv(1, 2, 128, 128, 64, device)
    kept, counts = lists(1, 2, 2, 2, device)
    counts.fill_(2)
    kept = torch.arange(2, dtype=torch.int32, device=device).expand(1, 2, 2, 2)
    want = scaled_dot_product_attention(q, k, v)
    errors = []
    for center in (key_center(k), None):
        (whole_q, q_scale), (whole_k, k_scale) = quantize_heads(q), quantize_heads(k, center)
        got = op.attention_blocks(whole_q, whole_k, v, kept, counts, q_scale=q_scale, k_scale=k_scale)
        errors.append(relative_error(got, want))
    assert errors[0] < INT8_SCORES
    assert errors[0] < errors[1]


def test_keys_that_are_not_kept_do_not_matter(device):
    args = list(arguments(SHAPES[1], device))
    before = op.attention_blocks(*args[:7])
    unseen = ~op.key_mask(args[3], args[4], 9).any(dim=2)  # per head, over its rows
    args[4] = args[4].clamp(max=4)  # no row sees all
    before = op.attention_blocks(*args[:7])
    unseen = ~op.key_mask(args[3], args[4], 9).any(dim=2)
    assert unseen.any()
    hidden = unseen.repeat_interleave(16, dim=2)[:, :, :130, None]
    args[1], args[2] = args[1].masked_fill(hidden, 1e4), args[2].masked_fill(hidden, float("nan"))
    assert torch.equal(op.attention_blocks(*args[:7]), before)


def test_a_row_without_blocks_answers_zero_and_a_nan_shows(device):
    args = list(arguments(SHAPES[1], device))
    args[2] = args[2].clone()
    args[2][0, 0, 0] = float("nan")
    out = op.attention_blocks(*args[:7])
    assert not out[:, :, 32:64].any(), "row 1 of the lists is empty"
    assert out[0, 0, :32].isnan().all(), "row 0 sees every block"
    assert out[0, 1].isfinite().all()


def test_heads_merge_without_a_copy(device):
    out = op.attention_blocks(*arguments(SHAPES[1], device)[:7])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"v": torch.zeros(1, 2, 40, 8)}, r"\[1, 2, 40, 8\]"),
        ({"block_q": 24}, "block_q=24"),
        ({"kept": torch.zeros(1, 2, 1, 3, dtype=torch.int32)}, r"kept \[1, 2, 2, 'L'\]"),
        ({"counts": torch.zeros(1, 2, 2)}, "float32"),
        ({"q_scale": torch.ones(1, 2, 32)}, "only then"),
        ({"q": torch.zeros(1, 2, 32, 8, dtype=torch.int8)}, "both int8"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    q, k, v = qkv(1, 2, 32, 48, 8, "cpu")
    kept, counts = lists(1, 2, 2, 3, "cpu")
    args = {"q": q, "k": k, "v": v, "kept": kept, "counts": counts, "block_q": 16, "block_k": 16}
    with pytest.raises(ValueError, match=named):
        op.attention_blocks(**args | change)


def test_a_scale_of_another_shape_is_refused_by_name():
    args = list(arguments(SHAPES[2], "cpu", scales="token"))
    args[8] = args[8][:, :, :-1]
    with pytest.raises(ValueError, match=r"k_scale is float32 \[1, 2, 200\] or \[1, 2, 4\]"):
        op.attention_blocks(*args)


def test_torch_accepts_the_op(device):
    args = arguments(SHAPES[0], device, scales="token")
    library.opcheck(torch.ops.quant_runtime.attention_blocks.default, args)
