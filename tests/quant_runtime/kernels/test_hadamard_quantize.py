import pytest
import torch
from torch import library

from quant_runtime.kernels import hadamard_quantize as op
from quant_runtime.kernels._fp8 import E4M3
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, TRITON_DTYPES, fp8_steps, rows, signs

SAME_SCALE = 1e-6  # relative: the rotation's float32 sums are rounded in another order
FLIPS = 1e-3  # of the entries may fall to the other side of a half, by one step
SHORT = 2**-10, 0.05  # the same where a GPU turns sums of 16-bit numbers in 11 bits
FP8_SMALL = 2**-2  # of 448: what terms a thousand times as large have cancelled to differs by their roundings
SHAPES = [(5, 6, 2), (33, 384, 128), (40, 48, 16), (3, 2048, 1024), (5, 768, 2)]
VERSIONS = [op.on_cpu, pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_versions_agree_with_the_reference(version, m, k, block, dtype, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    x, s = rows(m, k, device, outliers=True, dtype=dtype), signs(k, device)
    for bits, factor in ((8, None), (4, torch.rand(k, device=device) + 0.1)):
        q, scale = version(x, s, block, bits, factor)
        want_q, want_scale = op.reference(x, s, block, bits, factor)
        same, flips = SHORT if device == "cuda" and dtype != torch.float32 else (SAME_SCALE, FLIPS)
        assert ((scale - want_scale).abs() <= same * want_scale).all()
        assert (q.int() - want_q.int()).abs().max() <= 1
        assert (q != want_q).float().mean() < flips
    q, scale = version(x, s, block, 8, None, E4M3)
    want_q, want_scale = op.reference(x, s, block, 8, None, E4M3)
    assert ((scale - want_scale).abs() <= same * want_scale).all()
    steps = fp8_steps(q, want_q, interpreted=version is op.launch and device == "cpu")
    sizes = want_q.float().abs()
    assert steps[sizes > FP8_SMALL].max() <= (2 if same > SAME_SCALE else 1), "short sums are off by their terms' size"
    assert (steps[sizes > FP8_SMALL] > 0).float().mean() < flips


@pytest.mark.parametrize("version", [op.reference, *VERSIONS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_a_nan_shows_in_the_scale_of_its_row_alone(version, dtype, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    x = rows(4, 32, device)
    x[1, 3] = float("nan")
    _, scale = version(x, signs(32, device), 16, 8, None, dtype)
    assert scale.isfinite().tolist() == [True, False, True, True]


def test_what_either_half_refuses_is_refused():
    x, s = torch.zeros(2, 8), torch.ones(8, dtype=torch.int8)
    with pytest.raises(ValueError, match="divides K=8; got 3"):
        op.hadamard_quantize(x, s, 3)
    with pytest.raises(ValueError, match="bits=7"):
        op.hadamard_quantize(x, s, 4, bits=7)
    with pytest.raises(ValueError, match="float8_e4m3fn and bits=4"):
        op.hadamard_quantize(x, s, 4, bits=4, dtype=E4M3)


def test_torch_accepts_the_op(device):
    args = (rows(5, 48, device), signs(48, device), 16, 8, None)
    library.opcheck(torch.ops.quant_runtime.hadamard_quantize.default, args)
    library.opcheck(torch.ops.quant_runtime.hadamard_quantize.default, (*args, E4M3), test_utils=FP8_CHECKS)
