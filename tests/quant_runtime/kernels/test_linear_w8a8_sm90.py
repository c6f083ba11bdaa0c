"""On a Hopper alone: no interpreter runs these instructions."""

import pytest
import torch

from quant_runtime.formats import pack
from quant_runtime.kernels import _cuda, linear_w8a8, linear_w8a8_sm90
from quant_runtime.kernels.linear_packed import linear_packed
from tests.quant_runtime.kernels.inputs import ROUNDING, whole
from tests.quant_runtime.kernels.test_linear_w8a8 import inputs
from tests.support import relative_error

SHAPES = [  # some whole tiles, and rows, columns and channels that fill the last of theirs in part, or not at all
    (1024, 512, 1024),
    (1000, 264, 528),
    (1025, 1000, 656),
    (5003, 776, 1040),
    (70_001, 256, 512),  # several tiles for every program
    (65, 8, 16),
]
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _hopper(device):
    if not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")


def run(x, w, x_scale, w_scale, bias, out_dtype):
    """Into rows of what holds NaN before, and behind them still does."""
    y = torch.full((len(x) + 3, len(w)), torch.nan, dtype=out_dtype, device=x.device)
    assert linear_w8a8_sm90.takes(x, w, y[:-3], bias)
    linear_w8a8_sm90.launch(x, w, x_scale, w_scale, bias, y[:-3])
    assert y[-3:].isnan().all()
    return y[:-3]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [None, torch.float32, *HALVES])
@pytest.mark.parametrize("out_dtype", HALVES)
def test_it_agrees_with_the_reference(m, n, k, bias, out_dtype, device):
    offset = None if bias is None else torch.randn(n, device=device).to(bias)
    args = (*inputs(m, n, k, device), offset, out_dtype)
    assert relative_error(run(*args), linear_w8a8.reference(*args)) < ROUNDING[out_dtype]


def test_sums_are_exact(device):
    """Of ones and scales of powers of two nothing is rounded but the answer: every bit is the reference's."""
    x, w = whole(3001, 656, device, top=1), whole(520, 656, device, top=1)
    args = (x, w, torch.full((3001,), 0.5, device=device), torch.full((520,), 2.0, device=device), None)
    assert torch.equal(run(*args, torch.float16), linear_w8a8.reference(*args, torch.float16))


def test_the_largest_sums_are_sums(device):
    x = torch.full((1024, 16384), -128, dtype=torch.int8, device=device)
    scale = torch.full((1024,), 2.0**-20, device=device)
    y = run(x, x[:256], scale, scale[:256] * 2**10, None, torch.float16)
    assert y.eq(2.0**28 / 2**30).all()


def test_one_channel_of_64_may_be_thirty_times_as_large(device):
    x, w, *scales = inputs(2000, 512, 1024, device)
    x = torch.where(torch.arange(1024, device=device) % 64 == 0, x, x // 30)
    args = (x, w, *scales, None, torch.bfloat16)
    assert relative_error(run(*args), linear_w8a8.reference(*args)) < ROUNDING[torch.bfloat16]


def test_a_scale_that_is_not_finite_shows_in_its_row_or_column_alone(device):
    x, w, x_scale, w_scale = inputs(1100, 300 + 4, 528, device)
    x_scale[1050], w_scale[270] = torch.nan, torch.nan
    bad = run(x, w, x_scale, w_scale, None, torch.bfloat16).isnan()
    assert bad[1050].all()
    assert bad[:, 270].all()
    assert bad.sum() == 1100 + 304 - 1


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(linear_w8a8_sm90.FEW_ROWS, 256, 1024), (4096, 260, 1024), (4096, 256, 1032)],
)
def test_few_rows_and_rows_at_odd_places_are_left_to_triton(m, n, k, device):
    x, w, x_scale, w_scale = inputs(m, n, k, device)
    y = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    assert not linear_w8a8_sm90.takes(x, w, y, None)
    args = (x, w, x_scale, w_scale, None, torch.bfloat16)
    assert relative_error(linear_w8a8.launch_hopper(*args), linear_w8a8.reference(*args)) < ROUNDING[torch.bfloat16]


def test_answers_in_float32_and_what_begins_at_odd_places_are_too(device):
    x, w, _, _ = inputs(4096, 256, 1024, device)
    y = torch.empty(4096, 256, dtype=torch.bfloat16, device=device)
    assert linear_w8a8_sm90.takes(x, w, y, None)
    assert not linear_w8a8_sm90.takes(x, w, y.float(), None)
    assert not linear_w8a8_sm90.takes(
        x, w, torch.empty(4096 * 256 + 1, dtype=y.dtype, device=device)[1:].view_as(y), None
    )


def test_it_is_what_runs_there(device):
    x, w, x_scale, w_scale = inputs(5000, 512, 1024, device)
    small, bias = whole(512, 1024, device, top=7), torch.randn(512, device=device)
    for multiply, weights, given in ((linear_w8a8.linear_w8a8, w, (w,)), (linear_packed, small, (pack(small, 4), 4))):
        want = run(x, weights, x_scale, w_scale, bias, torch.bfloat16)
        assert torch.equal(multiply(x, *given, x_scale, w_scale, bias), want)
        out = torch.full_like(want, torch.nan)
        multiply(x, *given, x_scale, w_scale, bias, out=out)
        assert torch.equal(out, want)
