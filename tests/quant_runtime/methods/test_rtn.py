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
