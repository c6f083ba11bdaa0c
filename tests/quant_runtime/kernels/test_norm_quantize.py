import pytest
import torch
from torch import library
from torch.nn.functional import layer_norm

from quant_runtime.kernels import norm_quantize as op
from quant_runtime.kernels._fp8 import E4M3
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, FP32_ROUNDING, ROUNDING, TRITON_DTYPES, fp8_steps
from tests.support import relative_error

FLIPS = 1e-3  # of the entries may fall to the other side of a half, by one step
SHAPES = [(2, 5, 33), (1, 7, 256), (2, 3, 1100), (1, 3, 3072)]


def arguments(shape, device, dtype=torch.float32, gated=False, parts=1):
    """x with outlier channels; modulation as a linear layer leaves it, chunk by chunk; y and gate, or None.

    With `parts` 2 the modulation is of the first two tokens, and of the others.
    """
    batch, tokens, size = shape
    x, y = torch.randn(2, batch, tokens, size, device=device)
    x[..., ::64] *= 30
    modulation = torch.randn(batch, parts, 3 * size, device=device).to(dtype).chunk(3, dim=2)
    if parts == 1:
        modulation = [part[:, 0] for part in modulation]
    return x.to(dtype), *modulation[:2], *((y.to(dtype), modulation[2]) if gated else (None, None)), 1e-6


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_agrees_with_the_reference(shape, gated, parts, dtype, device):
    args, first = arguments(shape, device, dtype, gated, parts), 2 * (parts - 1)
    for bits, factor in ((8, None), (4, torch.rand(shape[2], device=device) + 0.1)):
        got, want = op.launch(*args, bits, factor, first), op.reference(*args, bits, factor, first)
        apart = (got[0].int() - want[0].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < FLIPS
        assert relative_error(got[1], want[1]) < FP32_ROUNDING
        assert not gated or relative_error(got[2], want[2]) < ROUNDING[dtype]
    got, want = op.launch(*args, 8, None, first, E4M3), op.reference(*args, 8, None, first, E4M3)
    steps = fp8_steps(got[0], want[0], interpreted=device == "cpu")
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < FLIPS
    assert relative_error(got[1], want[1]) < FP32_ROUNDING
    h, added = op.launch_plain(*args, first)
    assert relative_error(h, op.plain_reference(*args, first)[0]) < ROUNDING[dtype]
    assert not gated or relative_error(added, want[2]) < ROUNDING[dtype]


@pytest.mark.parametrize("gated", [False, True])
def test_it_is_the_modulated_norm_of_the_sum(gated, device):
    x, shift, scale, y, gate, eps = arguments(SHAPES[0], device, gated=gated)
    q, row_scale, added = op.norm_quantize(x, shift, scale, y, gate, eps)
    total = x if y is None else x + gate[:, None] * y
    want = layer_norm(total, total.shape[2:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    assert relative_error(added, total) < FP32_ROUNDING
    assert relative_error(q * row_scale[:, None], want.flatten(0, 1)) < 0.01
    assert relative_error(op.norm_modulate(x, shift, scale, y, gate, eps)[0], want) < FP32_ROUNDING


def test_tokens_in_front_are_modulated_by_the_first_of_two(device):
    x, shift, scale, y, gate, eps = arguments((2, 5, 32), device, gated=True, parts=2)
    for first in (0, 2, 5):
        rows = []
        for part, some in ((0, slice(0, first)), (1, slice(first, 5))):
            rows.append(op.norm_modulate(x[:, some], shift[:, part], scale[:, part], y[:, some], gate[:, part], eps))
        h, added = op.norm_modulate(x, shift, scale, y, gate, eps, first)
        assert relative_error(h, torch.cat([h for h, _ in rows], dim=1)) < FP32_ROUNDING
        assert relative_error(added, torch.cat([added for _, added in rows], dim=1)) < FP32_ROUNDING


@pytest.mark.parametrize("version", [op.reference, op.launch])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_a_nan_shows_in_the_scale_of_its_row_alone(version, dtype, device):
    args = arguments((1, 4, 32), device)
    args[0][0, 1, 3] = float("nan")
    assert version(*args, 8, None, 0, dtype)[1].isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(3, 8)}, r"\[3, 8\]"),
        ({"shift": torch.zeros(1, 8)}, r"\[1, 8\]"),
        ({"y": torch.zeros(2, 3, 8)}, "both or none"),
        ({"y": torch.zeros(2, 3, 8).half(), "gate": torch.zeros(2, 8)}, "float16"),
        ({"bits": 7}, "bits=7"),
        ({"bits": 4, "dtype": E4M3}, "float8_e4m3fn and bits=4"),
        ({"factor": torch.ones(9)}, r"\[9\]"),
        ({"first": 1}, "shift .*got 1"),
        ({"shift": torch.zeros(2, 2, 8)}, r"\[2, 2, 8\]"),
        ({"shift": torch.zeros(2, 2, 8), "scale": torch.zeros(2, 2, 8), "first": 4}, "got 4"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    args = {"x": torch.zeros(2, 3, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(ValueError, match=named):
        op.norm_quantize(**args | change)


def test_torch_accepts_the_ops(device):
    args = arguments(SHAPES[0], device, gated=True)
    library.opcheck(torch.ops.quant_runtime.norm_quantize.default, (*args, 8, None, 0))
    fp8 = (*args, 8, None, 0, E4M3)
    library.opcheck(torch.ops.quant_runtime.norm_quantize.default, fp8, test_utils=FP8_CHECKS)
    library.opcheck(torch.ops.quant_runtime.norm_modulate.default, (*args, 0))
