import pytest
import torch
from torch import library

from quant_runtime.kernels import linear_fp8 as op
from quant_runtime.kernels._fp8 import E4M3
from quant_runtime.kernels.linear_w8a8 import OUT_DTYPES
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, FP32_ROUNDING, ROUNDING, rows
from tests.support import relative_error

SHAPES = [(131, 264, 144), (1, 1, 1), (64, 64, 64), (65, 130, 100), (200, 96, 257), (7, 33, 2050)]
FAST_SUMS = 2**-7  # Hopper adds FP8 products up in some 14 bits
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
BFLOAT16_SUMS = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch multiplies into float32 so on a GPU")


def inputs(m, n, k, device):
    """Operands of all sizes that e4m3 has, with outlier channels."""
    x, w = rows(m, k, device, outliers=True).to(E4M3), (16 * rows(n, k, device)).to(E4M3)
    x_scale, w_scale = torch.rand(m, device=device) + 0.5, torch.rand(n, device=device) + 0.5
    return x, w, x_scale / (127 * k), w_scale  # float16 ends at 65504


def limit(out_dtype, device):
    return FAST_SUMS if device == "cuda" else ROUNDING[out_dtype]


def test_the_reference_is_the_matmul_of_the_dequantized_operands(device):
    x, w, x_scale, w_scale = inputs(5, 7, 33, device)
    want = (x.double() * x_scale[:, None]) @ (w.double() * w_scale[:, None]).T
    assert relative_error(op.reference(x, w, x_scale, w_scale, None, torch.float32), want) < FP32_ROUNDING


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_the_cpu_version_agrees_with_the_reference(m, n, k, out_dtype):
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
        args = (*inputs(m, n, k, "cpu"), bias, out_dtype)
        assert relative_error(op.on_cpu(*args), op.reference(*args)) < ROUNDING[out_dtype]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_the_library_s_matmul_agrees_with_the_reference(m, n, k, out_dtype, device):
    """On a CPU it is torch's own of the same name: what is put behind operands, and where scales go, is the same."""
    if device == "cuda" and not HAS_FP8:
        pytest.skip("this GPU has no FP8")
    for bias in (None, torch.randn(n, device=device).bfloat16()):
        args = (*inputs(m, n, k, device), bias, out_dtype)
        assert relative_error(op.launch(*args), op.reference(*args)) < limit(out_dtype, device)


@BFLOAT16_SUMS
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_a_gpu_without_fp8_answers_the_same_in_bfloat16(m, n, k, out_dtype):
    args = (*inputs(m, n, k, "cuda"), torch.randn(n, device="cuda"), out_dtype)
    assert relative_error(op.in_bfloat16(*args), op.reference(*args)) < ROUNDING[out_dtype]


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_plain_torch_answers_the_same_some_rows_at_a_time(out_dtype, device, monkeypatch):
    monkeypatch.setattr(op, "PART_ELEMENTS", 5 * 64)  # five rows
    args = (*inputs(37, 48, 64, device), torch.randn(48, device=device), out_dtype)
    assert relative_error(op.in_parts(*args), op.reference(*args)) < ROUNDING[out_dtype]


def test_sums_taken_some_rows_at_a_time_are_the_same(device, monkeypatch):
    args = (*inputs(37, 48, 64, device), torch.randn(48, device=device), torch.float32)
    whole = op.launch(*args)
    monkeypatch.setattr(op, "PART_ELEMENTS", 5 * 64)
    assert torch.equal(op.launch(*args), whole)


def test_a_card_without_fp8_is_given_bfloat16_and_told_so(monkeypatch):
    capability = {"cuda:6": (9, 0), "cuda:5": (8, 6)}
    op.has_fp8.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    for versions in (op._op, op._into):
        assert [str(versions.running(card)) for card in capability] == ["FP8, torch", "bfloat16, torch"]
    op.has_fp8.cache_clear()


@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_an_answer_goes_where_it_is_wanted(n, out_dtype, device):
    args = (*inputs(21, n, 40, device), torch.randn(n, device=device).to(out_dtype))
    held = torch.full((30, n), torch.nan, dtype=out_dtype, device=device)
    for version in (op.linear_fp8, op.launch):
        held.fill_(torch.nan)
        out = held[4:25]
        assert version(*args, out_dtype, out) is out
        assert relative_error(out, op.reference(*args, out_dtype)) < limit(out_dtype, device)
        assert held[:4].isnan().all()
        assert held[25:].isnan().all()


def test_no_rows_are_answered_by_none(device):
    assert op.linear_fp8(*inputs(0, 48, 64, device)).shape == (0, 48)
    assert op.launch(*inputs(0, 48, 64, device), None, torch.bfloat16).shape == (0, 48)


def test_products_of_the_largest_and_the_smallest_are_exact(device):
    """448 times 448 beside the smallest number times itself: float32 holds each, and their sum to its last bit."""
    x = torch.tensor([[448.0, 2**-9]], device=device).to(E4M3)
    one = torch.ones(1, device=device)
    y = op.linear_fp8(x, x, one, one, out_dtype=torch.float32)
    assert y.item() == torch.tensor(448.0 * 448 + 2**-18).item()


def test_a_scale_that_is_not_finite_shows_in_its_row(device):
    x, w, x_scale, w_scale = inputs(3, 4, 32, device)
    x_scale[1] = float("nan")
    for out_dtype in OUT_DTYPES:
        for version in (op.linear_fp8, op.launch):
            y = version(x, w, x_scale, w_scale, None, out_dtype)
            assert y.isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_later_call_leaves_an_earlier_answer_alone(device):
    y = op.linear_fp8(*inputs(200, 300, 64, device))
    kept = y.clone()
    op.linear_fp8(*inputs(200, 300, 64, device))
    assert torch.equal(y, kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"w": torch.zeros(4, 9).to(E4M3)}, r"\[4, 9\]"),
        ({"w": torch.zeros(4, 8, dtype=torch.int8)}, "int8"),
        ({"w_scale": torch.ones(5)}, r"w_scale \[4\]"),
        ({"x_scale": torch.ones(2).double()}, "float64"),
        ({"bias": torch.ones(3)}, r"bias \[4\]"),
        ({"out_dtype": torch.float64}, "out_dtype=torch.float64"),
        ({"out": torch.zeros(4, 2).bfloat16().t()}, r"strides \(1, 2\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    args = {"x": torch.zeros(2, 8).to(E4M3), "w": torch.zeros(4, 8).to(E4M3)}
    with pytest.raises(ValueError, match=named):
        op.linear_fp8(**args | {"x_scale": torch.ones(2), "w_scale": torch.ones(4)} | change)


def test_torch_accepts_the_op(device):
    args = (*inputs(5, 7, 32, device), torch.zeros(7, device=device), torch.float32)
    library.opcheck(torch.ops.quant_runtime.linear_fp8.default, args, test_utils=FP8_CHECKS)
