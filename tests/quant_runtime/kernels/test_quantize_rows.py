import pytest
import torch
from torch import library

from quant_runtime.kernels import quantize_rows as op
from quant_runtime.kernels._fp8 import E4M3
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, fp8_steps, rows

FUSED = 2e-3  # of the entries: 16-bit numbers lie at a half often, and where a GPU fuses they are rounded once less
HALF_A_STEP = 0.5 + 1e-5  # of the scale; x * (1 / scale) is itself rounded
FP8_TIES = 0.03  # of FP8: bfloat16 numbers lie at a half of its short steps often; there the interpreter rounds up
FP8_ROUNDED = 2**-4 * (1 + 1e-5)  # of a number: half of the last of three bits behind the first
FP8_SMALLEST = 2**-10 * (1 + 1e-5)  # of the scale: half of the smallest number
SHAPES = [(1, 1), (5, 33), (8, 128), (21, 257), (2, 5000)]
VERSIONS = [op.on_cpu, pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))]


def on_device(version, device):
    return version is op.launch or device == "cpu"


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("outliers", [False, True])
def test_the_reference_rounds_every_entry_to_the_nearest_step(bits, outliers, device):
    x = rows(20, 130, device, outliers)
    q, scale = op.reference(x, bits, None)
    top = 2 ** (bits - 1) - 1
    assert q.abs().amax(dim=1).eq(top).all(), "the largest entry of a row is the largest whole number"
    assert ((x - q * scale[:, None]).abs() <= HALF_A_STEP * scale[:, None]).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_versions_agree_with_the_reference_to_the_last_bit(version, dtype, m, k, device):
    if not on_device(version, device):
        pytest.skip("the CPU version runs on CPU tensors")
    x = rows(m, k, device, outliers=True, dtype=dtype)
    for bits, factor in ((8, None), (6, torch.rand(k, device=device) + 0.1), (4, None)):
        q, scale = version(x, bits, factor)
        want_q, want_scale = op.reference(x, bits, factor)
        assert torch.equal(scale, want_scale)
        assert (q.int() - want_q.int()).abs().max() <= (device == "cuda"), (
            "a GPU may fuse the product into the rounding"
        )
        assert (q != want_q).float().mean() < (FUSED if device == "cuda" else 1e-4)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_reference_rounds_every_entry_to_the_nearest_number_of_fp8(outliers, device):
    x = rows(20, 130, device, outliers)
    q, scale = op.reference(x, 8, None, E4M3)
    assert q.float().abs().amax(dim=1).eq(448).all(), "the largest entry of a row is the largest number"
    apart = (x - q.float() * scale[:, None]).abs()
    assert (apart <= torch.maximum(FP8_ROUNDED * x.abs(), FP8_SMALLEST * scale[:, None])).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_versions_round_to_fp8_as_the_reference_does(version, dtype, m, k, device):
    if not on_device(version, device):
        pytest.skip("the CPU version runs on CPU tensors")
    x = rows(m, k, device, outliers=True, dtype=dtype)
    for factor in (None, torch.rand(k, device=device) + 0.1):
        q, scale = version(x, 8, factor, E4M3)
        want_q, want_scale = op.reference(x, 8, factor, E4M3)
        assert q.dtype == E4M3
        assert torch.equal(scale, want_scale)
        steps = fp8_steps(q, want_q, interpreted=version is op.launch and device == "cpu")
        assert steps.max() <= (version is op.launch), "a GPU may fuse the product into the rounding"
        assert (steps > 0).float().mean() < (FP8_TIES if version is op.launch else 1e-4)


@pytest.mark.parametrize("version", [op.reference, *VERSIONS])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_a_value_that_is_not_finite_shows_in_the_scale_of_its_row_alone(version, dtype, device):
    x = rows(4, 40, device)
    x[1, 3], x[2, 7] = float("nan"), float("inf")
    _, scale = version(x, 8, None, dtype)
    assert scale.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("version", [op.reference, *VERSIONS])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_a_row_of_zeros_stays_zero(version, dtype, device):
    q, scale = version(torch.zeros(2, 9, device=device), 8, None, dtype)
    assert not q.float().any()
    assert (scale > 0).all()


def test_a_later_call_leaves_an_earlier_answer_alone(device):
    x = rows(300, 2000, device)
    q, scale = op.quantize_rows(x)
    kept = q.clone(), scale.clone()
    op.quantize_rows(rows(300, 2000, device) * 7)
    assert torch.equal(q, kept[0])
    assert torch.equal(scale, kept[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "[2, 3, 4]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int8)}, "int8"),
        ({"bits": 5}, "bits=5"),
        ({"bits": 6, "dtype": E4M3}, "float8_e4m3fn and bits=6"),
        ({"dtype": torch.float8_e5m2}, "got torch.float8_e5m2"),
        ({"factor": torch.zeros(4)}, "factor"),
    ],
)
def test_what_it_cannot_round_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named.replace("[", r"\[")):
        op.quantize_rows(**{"x": torch.zeros(2, 3)} | change)


def test_torch_accepts_the_op(device):
    library.opcheck(torch.ops.quant_runtime.quantize_rows.default, (rows(5, 33, device), 8, None))
    args = (rows(5, 33, device), 8, None, E4M3)
    library.opcheck(torch.ops.quant_runtime.quantize_rows.default, args, test_utils=FP8_CHECKS)
