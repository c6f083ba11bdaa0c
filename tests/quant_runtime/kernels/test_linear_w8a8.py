import pytest
import torch
from torch import library

from quant_runtime.kernels import linear_w8a8 as op
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, ROUNDING, TRITON_DTYPES, whole
from tests.support import relative_error

SHAPES = [(131, 264, 144), (1, 1, 1), (64, 64, 64), (65, 130, 100), (200, 96, 257), (7, 33, 2050)]


def inputs(m, n, k, device):
    x_scale, w_scale = torch.rand(m, device=device) + 0.5, torch.rand(n, device=device) + 0.5
    return whole(m, k, device), whole(n, k, device), x_scale / (127 * k), w_scale  # float16 ends at 65504


def test_the_reference_is_the_matmul_of_the_dequantized_operands(device):
    x, w, x_scale, w_scale = inputs(5, 7, 33, device)
    want = (x * x_scale[:, None]).double() @ (w * w_scale[:, None]).double().T
    assert relative_error(op.reference(x, w, x_scale, w_scale, None, torch.float32), want) < FP32_ROUNDING


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out_dtype", op.OUT_DTYPES)
def test_the_cpu_version_agrees_with_the_reference(m, n, k, out_dtype):
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
        args = (*inputs(m, n, k, "cpu"), bias, out_dtype)
        assert relative_error(op.on_cpu(*args), op.reference(*args)) < ROUNDING[out_dtype]


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", TRITON_DTYPES)
def test_triton_agrees_with_the_reference(m, n, k, with_bias, out_dtype, device):
    args = (*inputs(m, n, k, device), torch.randn(n, device=device) if with_bias else None, out_dtype)
    assert relative_error(op.launch(*args), op.reference(*args)) < ROUNDING[out_dtype]


def test_sums_too_large_for_float32_are_exact(device):
    x = torch.full((2, 4096), 127, dtype=torch.int8, device=device)
    w = torch.full((3, 4096), 127, dtype=torch.int8, device=device)
    w[:, 0] = 126
    one = torch.ones(3, device=device)
    y = op.linear_w8a8(x, w, one[:2], one, out_dtype=torch.float32)
    assert y.eq(torch.tensor(4096.0 * 127 * 127 - 127)).all(), "66,064,257 needs 26 bits before its one rounding"


def test_a_scale_that_is_not_finite_shows_in_its_row(device):
    x, w, x_scale, w_scale = inputs(3, 4, 32, device)
    x_scale[1] = float("nan")
    y = op.linear_w8a8(x, w, x_scale, w_scale, out_dtype=torch.float32)
    assert y.isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_later_call_leaves_an_earlier_answer_alone(device):
    y = op.linear_w8a8(*inputs(200, 300, 64, device), out_dtype=torch.bfloat16)
    kept = y.clone()
    op.linear_w8a8(*inputs(200, 300, 64, device), out_dtype=torch.bfloat16)
    assert torch.equal(y, kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"w": torch.zeros(4, 9, dtype=torch.int8)}, r"\[4, 9\]"),
        ({"w": torch.zeros(4, 8)}, "float32"),
        ({"w_scale": torch.ones(5)}, r"w_scale \[4\]"),
        ({"x_scale": torch.ones(2).double()}, "float64"),
        ({"bias": torch.ones(3)}, r"bias \[4\]"),
        ({"out_dtype": torch.float64}, "out_dtype=torch.float64"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    args = {"x": whole(2, 8, "cpu"), "w": whole(4, 8, "cpu"), "x_scale": torch.ones(2), "w_scale": torch.ones(4)}
    with pytest.raises(ValueError, match=named):
        op.linear_w8a8(**args | change)


def test_torch_accepts_the_op(device):
    args = (*inputs(5, 7, 32, device), torch.zeros(7, device=device), torch.float32)
    library.opcheck(torch.ops.quant_runtime.linear_w8a8.default, args)
