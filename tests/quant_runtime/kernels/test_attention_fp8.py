import pytest
import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention

from quant_runtime.kernels import attention_fp8 as op
from quant_runtime.kernels.pack_heads import pack_heads
from tests.quant_runtime.kernels.inputs import FP16_ROUNDING, FP32_ROUNDING, lists
from tests.support import relative_error

P_ROUNDED = 0.04  # e4m3 has 3 bits behind the first: P is off by 2**-4 of itself at most, and random values add few up
INTERPRETED = 0.1  # Triton's interpreter rounds up to a power of two as down to half of it: one in 64 is half itself
SCORES_ROUNDED = 2**-17  # half a step of a float32 of 128 to 256, as scores here are; a weight is off by that share
FP8 = 0.05  # P and V in e4m3, q and k in int8, where an answer is the mean of some hundred values that cancel
SHAPES = [
    (1, 2, 200, 64, 64),
    (2, 1, 300, 32, 128),
    (2, 2, 300, 64, 128),
    (1, 2, 130, 128, 64),
    (1, 1, 64, 96, 64),
    (1, 1, 5, 64, 128),
]


def limit(device):
    return P_ROUNDED if device == "cuda" else INTERPRETED


def qkv(batch, heads, tokens, size, device):
    """As a fused projection leaves them; one channel in 64 is 10 times as large, and keys have a part in common."""
    x = torch.randn(batch, tokens, 3, heads, size, device=device)
    x[..., ::64] *= 10
    x[:, :, 1] += 3 * torch.randn(size, device=device)
    return x.permute(2, 0, 3, 1, 4)


def arguments(shape, device, out_dtype=torch.float32):
    """Of the op without a residual."""
    return *refresh_arguments(shape, device, out_dtype), None, None


def refresh_arguments(shape, device, out_dtype=torch.float32):
    """Lists of all blocks, those that are kept in front: of row 0 all, of row 1 none, of others some."""
    batch, heads, tokens, size, block = shape
    packed = pack_heads(*qkv(batch, heads, tokens, size, device), block)
    rows = -(-tokens // block)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    kept, counts = lists(batch, heads, rows, rows, device)
    every = torch.arange(rows, device=device)
    first = torch.arange(rows, device=device) < counts[..., None]
    missing = [
        [block for block in every.tolist() if block not in one[mine].tolist()]
        for one, mine in zip(kept.flatten(0, 2), first.flatten(0, 2), strict=True)
    ]
    for one, mine, rest in zip(kept.flatten(0, 2), first.flatten(0, 2), missing, strict=True):
        one[~mine] = torch.tensor(rest, dtype=torch.int32, device=device)
    return *operands, kept, counts, tokens, block, block, out_dtype, size**-0.5


def residual(shape, device, dtype):
    """(residual, residual_scale) as the op takes them; one channel in 64 is 10 times as large."""
    batch, heads, tokens, size, _ = shape
    x = torch.randn(batch, tokens, heads, size, device=device).transpose(1, 2)
    x[..., ::64] *= 10
    if dtype != torch.int8:
        return x.to(dtype), None
    scale = x.abs().amax(dim=3) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cpu_version_agrees_with_the_reference(shape):
    args = arguments(shape, "cpu")
    assert relative_error(op.on_cpu(*args), op.reference(*args)) < SCORES_ROUNDED


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_triton_agrees_with_the_reference(shape, out_dtype, device):
    args = arguments(shape, device, out_dtype)
    assert relative_error(op.launch(*args), op.reference(*args)) < limit(device)


@pytest.mark.parametrize("version", [op.reference, op.on_cpu, op.launch])
@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16])
def test_a_residual_is_added_before_the_answer_is_rounded(version, shape, dtype, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    args, its = refresh_arguments(shape, device), residual(shape, device, dtype)
    want = version(*args, None, None) + op.unpacked_residual(*its)
    assert relative_error(version(*args, *its), want) < FP32_ROUNDING
    assert relative_error(version(*args, *its), op.reference(*args, *its)) < limit(device)
    half = list(args)
    half[11] = torch.float16
    assert relative_error(version(*half, *its), want) < FP16_ROUNDING


def shuffled(shape, device, shared):
    batch, heads, count, *_ = shape
    tokens = torch.rand(batch, heads, count, device=device).argsort(dim=2).to(torch.int32)
    return tokens[:1, :1].expand(batch, heads, count) if shared else tokens


def placed(x, tokens):
    return x.gather(2, tokens.long()[..., None].expand_as(x))


@pytest.mark.parametrize("version", [op.reference, op.on_cpu, op.launch])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float32])
def test_answers_go_to_the_tokens_of_their_places_and_what_is_added_lies_there(version, shared, dtype, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    shape = (2, 2, 200, 64, 64)
    args, tokens = refresh_arguments(shape, device), shuffled(shape, device, shared)
    added, scale = (None, None) if dtype is None else residual(shape, device, dtype)
    out = version(*args, added, scale, tokens)
    want = version(*args, None, None)
    if added is not None:
        want = want + placed(op.unpacked_residual(added, scale), tokens)
    assert relative_error(placed(out, tokens), want) < FP32_ROUNDING
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("version", [op.on_cpu, op.launch])
def test_all_blocks_kept_is_dense_attention(version, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    q, k, v = torch.randn(3, 2, 2, 200, 64, device=device)
    packed = pack_heads(q, k, v, 64)
    kept = torch.arange(4, dtype=torch.int32, device=device).expand(2, 2, 4, 4)  # one list for all rows
    counts = torch.full((2, 2, 4), 4, dtype=torch.int32, device=device)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    got = version(*operands, kept, counts, 200, 64, 64, torch.float32, 64**-0.5, None, None)
    want = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(got, want) < (INTERPRETED if version is op.launch and device == "cpu" else FP8)


@pytest.mark.parametrize("version", [op.reference, op.launch])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_a_row_without_blocks_answers_zero_and_what_is_not_finite_shows(version, device):
    args = list(arguments(SHAPES[0], device))
    args[4] = args[4].clone()
    args[4][0, 0, 0] = float("nan")  # the scale of the first block of keys of one head
    out = version(*args)
    assert not out[:, :, 64:128].any(), "row 1 of the lists is empty"
    assert out[0, 0, :64].isnan().all(), "row 0 sees every block"
    assert out[0, 1].isfinite().all()


def test_padding_behind_the_last_key_does_not_matter(device):
    args = list(arguments(SHAPES[0], device))
    before = op._op(*args)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, :, 200:] = 127
    args[2].view(torch.uint8)[..., op.slots(256) >= 200] = 0x77  # 240: P of these keys is zero
    assert torch.equal(op._op(*args), before)


def test_slots_hold_every_key_once():
    assert op.slots(96).sort().values.tolist() == list(range(96))
    assert op.slots(32)[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]


def test_heads_merge_without_a_copy(device):
    assert op._op(*arguments(SHAPES[0], device)).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_q": 32}, "block_q=32"),
        ({"keys": 100}, r"k as torch.int8 \[1, 2, 128, 64\]"),
        ({"q_scale": torch.ones(1, 2, 4)}, r"q_scale as torch.float32 \[1, 2, 200\]"),
        ({"v": torch.zeros(1, 2, 64, 256)}, "v as torch.float8_e4m3fn"),
        ({"counts": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"counts as torch.int32 \[1, 2, 4\]"),
        ({"out_dtype": torch.float64}, "out_dtype=torch.float64"),
        ({"tokens": torch.zeros(1, 2, 200, dtype=torch.int64)}, r"tokens as torch.int32 \[1, 2, 200\]"),
        ({"residual": torch.zeros(1, 2, 64, 200)}, r"residual as int8, float32, bfloat16 or float16 \[1, 2, 200, 64\]"),
        ({"residual": torch.zeros(1, 2, 200, 64, dtype=torch.float64)}, "got torch.float64"),
        ({"residual": torch.zeros(1, 2, 200, 64, dtype=torch.int8)}, "residual_scale with an int8 residual"),
        ({"residual_scale": torch.ones(1, 2, 200)}, "and only then; it is none"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    names = (
        "q",
        "k",
        "v",
        "q_scale",
        "k_scale",
        "v_scale",
        "kept",
        "counts",
        "keys",
        "block_q",
        "block_k",
        "out_dtype",
    )
    args = dict(zip(names, arguments(SHAPES[0], "cpu"), strict=False))
    with pytest.raises(ValueError, match=named):
        op.attention_fp8(**args | change)


def test_torch_accepts_the_op(device):
    checks = ("test_autograd_registration", "test_faketensor")  # the others multiply what they are given, FP8 too
    library.opcheck(torch.ops.quant_runtime.attention_fp8.default, arguments(SHAPES[3], device), test_utils=checks)
