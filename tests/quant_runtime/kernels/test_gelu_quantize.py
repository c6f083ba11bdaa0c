import pytest
import torch
from torch import library
from torch.nn.functional import gelu

from quant_runtime.kernels import gelu_quantize as op
from quant_runtime.kernels._fp8 import E4M3
from quant_runtime.kernels._triton import jit, tl, triton
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, FP32_ROUNDING, TRITON_DTYPES, fp8_steps, rows
from tests.support import relative_error

FLIPS = 1e-3  # of the entries may fall to the other side of a half, by one step
FP8_FLIPS = 5e-3  # the same of FP8, where GELU's small answers, each with bits of its own, are not all zero


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(("m", "j", "k"), [(5, 0, 33), (3, 17, 256), (2, 256, 1100), (2, 3072, 12288)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.filterwarnings("ignore:overflow")  # numpy says so in the interpreter: 1 / inf is the zero that is meant
def test_triton_agrees_with_the_reference(m, j, k, dtype, exact, device):
    x, before = rows(m, k, device, outliers=True, dtype=dtype), rows(m, j, device, dtype=dtype) if j else None
    for bits, factor in ((8, None), (6, torch.rand(j + k, device=device) + 0.1)):
        got, want = op.launch(x, before, bits, factor, exact), op.reference(x, before, bits, factor, exact)
        apart = (got[0].int() - want[0].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < FLIPS
        assert relative_error(got[1], want[1]) < FP32_ROUNDING
    if device == "cpu":  # of floats below 2**-126, which GELU answers farther out, Triton's interpreter makes any e4m3
        x = x.clamp(min=-11.0)
    got, want = op.launch(x, before, 8, None, exact, E4M3), op.reference(x, before, 8, None, exact, E4M3)
    steps = fp8_steps(got[0], want[0], interpreted=device == "cpu")
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < FP8_FLIPS
    assert relative_error(got[1], want[1]) < FP32_ROUNDING


def test_it_is_what_stands_before_and_the_gelu(device):
    x, before = rows(5, 40, device), rows(5, 24, device)
    q, scale = op.gelu_quantize(x, before)
    want = torch.cat([before, gelu(x, approximate="tanh")], dim=1)
    assert relative_error(q * scale[:, None], want) < 0.01


@pytest.mark.parametrize("version", [op.reference, op.launch])
def test_the_two_forms_of_gelu_are_told_apart_where_they_differ_most(version, device):
    """By 5e-4 at 2.4, which is six steps where the largest is a hundredth."""
    x = torch.tensor([[-2.4, -2.7]], device=device)
    for exact, form in ((False, "tanh"), (True, "none")):
        q, scale = version(x, None, 8, None, exact)
        assert relative_error(q * scale[:, None], gelu(x, approximate=form)) < 0.005
    other = gelu(x, approximate="tanh")
    assert relative_error(gelu(x), other) > 0.02


@jit
def _gelus(x, y, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(y + at, op._exact(tl.load(x + at)))


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore:overflow")  # numpy says so in the interpreter: 2 ** -inf is the zero that is meant
def test_the_exact_gelu_is_off_by_a_millionth_at_most(device):
    near = torch.arange(-(2**19), 2**19, device=device) * 2.0**-15  # up to 16
    far = 2.0 ** torch.arange(4, 128, 2.0**-4, device=device)
    x = torch.cat([near, far, -far, torch.zeros(128, device=device)])
    y = torch.full_like(x, torch.nan)
    _gelus[(len(x) // 4096,)](x, y, COUNT=4096)
    assert ((y.double() - gelu(x.double())).abs() <= 1e-6 + 2.0**-24 * x.abs()).all()  # and half a step of float32


@pytest.mark.parametrize("exact", [False, True])
def test_of_values_far_out_gelu_is_the_value_or_nothing(exact, device):
    x = torch.tensor([[-1e4, 1e4, -60.0, 60.0]], device=device)
    q, scale = op.gelu_quantize(x, exact=exact)
    assert scale.item() == pytest.approx(1e4 / 127)
    assert q.tolist() == [[0, 127, 0, 1]]


@pytest.mark.parametrize("version", [op.reference, op.launch])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_a_nan_shows_in_the_scale_of_its_row_alone(version, dtype, device):
    x, before = rows(4, 40, device), rows(4, 8, device)
    x[1, 3], before[2, 0] = float("nan"), float("nan")
    assert version(x, before, 8, None, False, dtype)[1].isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"\[2, 3, 8\]"),
        ({"before": torch.zeros(3, 4)}, r"\[3, 4\]"),
        ({"before": torch.zeros(2, 4).half()}, "float16"),
        ({"bits": 5}, "bits=5"),
        ({"bits": 6, "dtype": E4M3}, "float8_e4m3fn and bits=6"),
        ({"factor": torch.ones(9)}, r"\[9\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        op.gelu_quantize(**{"x": torch.zeros(2, 8)} | change)


def test_torch_accepts_the_op(device):
    args = (rows(3, 16, device), rows(3, 8, device), 8, None, True)
    library.opcheck(torch.ops.quant_runtime.gelu_quantize.default, args)
    library.opcheck(torch.ops.quant_runtime.gelu_quantize.default, (*args, E4M3), test_utils=FP8_CHECKS)
