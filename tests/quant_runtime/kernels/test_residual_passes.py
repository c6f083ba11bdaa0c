import pytest
import torch
from torch import library

from quant_runtime.kernels import residual_passes as op
from tests.quant_runtime.kernels.inputs import NO_BF16
from tests.support import relative_error

SHAPES = [(1, 2, 200, 64), (2, 1, 70, 32), (1, 3, 5, 128), (1, 1, 129, 96)]  # batch, heads, tokens, size
TF32 = 2e-3  # a GPU multiplies with 11 bits
FLOAT32 = 1e-5  # sums of some hundred numbers in another order
STEP = 0.02  # of int8: an entry on the other side of a half
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NO_BF16)]


def limit(device):
    return TF32 if device == "cuda" else FLOAT32


def laid_out(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def kept(x, bits):
    """(values [B, N, H, W], scale) of x [B, H, N, W]."""
    values, scale = op._rounded(x.float(), x.dtype, bits)
    return values, scale if bits == 8 else None


def arguments(shape, device, dtype=torch.float32, bits=8, rank=8, trend=True):
    """(lost, before); one channel in 64 is 10 times as large."""
    batch, heads, tokens, size = shape
    base = torch.randn(shape, device=device)
    base[..., ::64] *= 10
    lost = laid_out((base + 0.3 * torch.randn(shape, device=device)).to(dtype))
    if not trend:
        return lost, (kept(base.to(dtype), bits), None, None, None)
    left = kept(torch.randn(batch, heads, tokens, rank, device=device).to(dtype), bits)
    right = torch.linalg.qr(torch.randn(batch, heads, size, rank, device=device)).Q
    return lost, (kept(base.to(dtype), bits), left, right, torch.ones((), device=device))


def real(rows):
    values, scale = rows
    values = values.transpose(1, 2).float()
    return values if scale is None else values * scale[..., None]


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "trend"), [(8, True), (8, False), (16, True)])
def test_triton_forms_the_gram_matrices_of_the_reference(shape, dtype, bits, trend, device):
    lost, before = arguments(shape, device, dtype, bits, trend=trend)
    flat = op._flat(before)
    (grams, squares), want = op.launch_differences(lost, *flat), op.differences_reference(lost, *flat)
    assert relative_error(grams, want[0]) < limit(device)
    assert relative_error(squares, want[1]) < limit(device)
    assert bool(squares[1]) == trend


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "trend", "rank"), [(8, True, 16), (8, False, 5), (16, True, 32)])
def test_triton_keeps_what_the_reference_keeps(shape, dtype, bits, trend, rank, device):
    lost, before = arguments(shape, device, dtype, bits, trend=trend)
    vectors = torch.linalg.qr(torch.randn(*shape[:2], shape[3], rank, device=device)).Q
    args = (lost, *op._flat(before), vectors, torch.ones((), device=device), bits)
    got, want = op.launch_entry(*args), op.entry_reference(*args)
    for at in (0, 2):
        assert got[at].dtype == want[at].dtype
        rows = [(one[at], one[at + 1] if bits == 8 else None) for one in (got, want)]
        rounded = STEP if bits == 8 else 2 * torch.finfo(dtype).eps
        assert relative_error(real(rows[0]), real(rows[1])) < max(rounded, limit(device))
    assert got[1].shape == want[1].shape


@pytest.mark.parametrize("adds", [0.0, 1.0])
def test_what_was_lost_comes_back_from_what_is_kept(adds, device):
    """C less what was added of left vectors^T, as it was rounded, is Delta."""
    lost, before = arguments(SHAPES[0], device, bits=16)
    vectors = torch.linalg.qr(torch.randn(1, 2, 64, 8, device=device)).Q
    dense, left = op.residual_entry(lost, before, vectors, torch.full((), adds, device=device), 16)
    assert relative_error(real(dense) - adds * (real(left) @ vectors.mT), lost) < limit(device)
    again = (dense, left, vectors, torch.full((), adds, device=device))
    grams, squares = op.residual_differences(lost, again)
    assert float(squares[0]) < (limit(device) * lost.norm()) ** 2, "nothing has changed since"
    assert grams.norm() < limit(device) * (lost.mT @ lost).norm()


@pytest.mark.parametrize("version", [op.entry_reference, op.launch_entry])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_shows(version, device):
    lost, before = arguments(SHAPES[0], device, trend=False)
    before[0][0].zero_()
    lost[0, 0, 3], lost[0, 1, 4, 5] = 0, float("nan")
    vectors = torch.linalg.qr(torch.randn(1, 2, 64, 8, device=device)).Q
    dense, scale, left, left_scale = version(lost, *op._flat(before), vectors, torch.zeros((), device=device), 8)
    assert not dense[0, 3, 0].any()
    assert 0 < float(scale[0, 0, 3]) < 1e-20
    assert scale[0, 1, 4].isnan()
    assert left_scale[0, 1, 4].isnan()
    assert scale.isfinite().sum() == scale.numel() - 1
    assert left.shape == (1, 200, 2, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lost": torch.zeros(1, 2, 200, 64)}, r"laid out as \[B, N, H, D\]"),
        ({"vectors": torch.zeros(1, 2, 64, 65)}, "r at most 64"),
        ({"bits": 4}, "bits=4"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, named):
    lost, before = arguments(SHAPES[0], "cpu")
    args = {"lost": lost, "before": before, "vectors": torch.zeros(1, 2, 64, 8), "adds": torch.ones(()), "bits": 8}
    with pytest.raises(ValueError, match=named):
        op.residual_entry(**args | change)


def test_torch_accepts_the_ops(device):
    checks = ("test_autograd_registration", "test_faketensor")
    lost, before = arguments(SHAPES[1], device)
    flat = op._flat(before)
    library.opcheck(torch.ops.quant_runtime.residual_differences.default, (lost, *flat), test_utils=checks)
    vectors = torch.zeros(2, 1, 32, 4, device=device)
    rest = (vectors, torch.ones((), device=device), 8)
    library.opcheck(torch.ops.quant_runtime.residual_entry.default, (lost, *flat, *rest), test_utils=checks)
