import pytest
import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention

from quant_runtime.kernels import attention_fp8 as op
from quant_runtime.kernels.pack_heads import pack_heads
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, lists
from tests.support import relative_error

P_ROUNDED = 0.04  # e4m3 has 3 bits behind the first: P is off by 2**-4 of itself at most, and random values add few up
INTERPRETED = 0.1  # Triton's interpreter rounds up to a power of two as down to half of it: one in 64 is half itself
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
    batch, heads, tokens, size, block = shape
    packed = pack_heads(*qkv(batch, heads, tokens, size, device), block)
    rows = -(-tokens // block)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    return *operands, *lists(batch, heads, rows, rows, device), tokens, block, block, out_dtype, size**-0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cpu_version_agrees_with_the_reference(shape):
    args = arguments(shape, "cpu")
    assert relative_error(op.on_cpu(*args), op.reference(*args)) < FP32_ROUNDING


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_triton_agrees_with_the_reference(shape, out_dtype, device):
    args = arguments(shape, device, out_dtype)
    assert relative_error(op.launch(*args), op.reference(*args)) < limit(device)


@pytest.mark.parametrize("version", [op.on_cpu, op.launch])
def test_all_blocks_kept_is_dense_attention(version, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    q, k, v = torch.randn(3, 2, 2, 200, 64, device=device)
    packed = pack_heads(q, k, v, 64)
    kept = torch.arange(4, dtype=torch.int32, device=device).expand(2, 2, 4, 4)  # one list for all rows
    counts = torch.full((2, 2, 4), 4, dtype=torch.int32, device=device)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    got = version(*operands, kept, counts, 200, 64, 64, torch.float32, 64**-0.5)
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
