import pytest
import torch

from quant_runtime import formats
from quant_runtime.methods.rtn import Rtn
from tests.quant_runtime.layers import observed


@pytest.mark.parametrize("fmt", [formats.W8A8, formats.W4A8], ids=str)
def test_every_weight_is_at_most_half_a_step_away(fmt, device):
    layer, stats = observed(65, 20, device)
    quantized = Rtn().quantize(layer, stats, fmt)
    step = quantized.weight_scale.view(torch.bfloat16).float()[:, None]
    assert ((quantized.dequantized() - layer.weight).abs() <= step * 0.5001).all()  # the quotient is rounded itself


def test_every_fp8_weight_is_the_nearest_number_of_its_row(device):
    layer, stats = observed(65, 20, device)
    quantized = Rtn().quantize(layer, stats, formats.FP8)
    scale = quantized.weight_scale.view(torch.bfloat16).float()[:, None]
    numbers = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    nearest = ((layer.weight.detach() / scale)[..., None] - numbers).abs().amin(dim=-1)
    apart = (quantized.dequantized() - layer.weight.detach()).abs() / scale
    assert (apart <= nearest * 1.0001 + 1e-4).all()  # of 448, in which the quotient is rounded itself


def test_a_row_s_largest_weight_is_at_the_top_of_fp8(device):
    """Its scale is rounded to bfloat16 first, by up to 2**-9: a quotient above 448 is 448, and none is NaN."""
    layer, _ = observed(64, 500, device)
    whole, scale = Rtn().round_weight(layer.weight.detach(), formats.FP8)
    assert whole.float().abs().amax(dim=1).eq(448).all()
    assert (layer.weight.abs().amax(dim=1) / scale.float() > 448).any()


@pytest.mark.parametrize("fmt", [formats.FP8, formats.W4AFP8], ids=str)
def test_a_clip_search_is_never_worse_in_fp8_either(fmt, device):
    layer, stats = observed(64, 20, device)
    kept, searched = (Rtn(clip).quantize(layer, stats, fmt).dequantized() for clip in ("absmax", "mse"))
    errors = [(weight - layer.weight).square().sum(dim=1) for weight in (kept, searched)]
    assert (errors[1] <= errors[0] * 1.0001).all()


def test_a_clip_search_lessens_the_squared_error_of_rows_with_an_outlier(device):
    layer, stats = observed(64, 20, device)
    with torch.no_grad():
        layer.weight[:, 3] *= 4
    kept, searched = (Rtn(clip).quantize(layer, stats, formats.W4A8).dequantized() for clip in ("absmax", "mse"))
    errors = [(weight - layer.weight).square().sum(dim=1) for weight in (kept, searched)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_a_row_of_zeros_stays_zero(device):
    layer, stats = observed(16, 4, device)
    with torch.no_grad():
        layer.weight[2] = 0
    assert not Rtn().quantize(layer, stats, formats.W4A8).dequantized()[2].any()


def test_another_clip_is_refused():
    with pytest.raises(ValueError, match="'percentile'"):
        Rtn("percentile")
