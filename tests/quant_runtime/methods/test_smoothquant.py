import pytest
import torch

from quant_runtime import formats
from quant_runtime.methods.rtn import Rtn
from quant_runtime.methods.smoothquant import SmoothQuant, smoothing_scale
from quant_runtime.quality import sqnr
from tests.quant_runtime.layers import observed, tokens

SMALL = 1e-4  # of weights that were multiplied and divided by the same factors, and rounded to 8 bits of a tiny scale


def test_moving_the_outliers_brings_the_answer_closer(device):
    layer, stats = observed(96, 70, device)
    x = tokens(96, device)
    plain, smooth = (method.quantize(layer, stats, formats.W8A8) for method in (Rtn(), SmoothQuant()))
    assert sqnr(layer(x), smooth(x)) > sqnr(layer(x), plain(x)) + 6  # measured: 34.4 dB against 44.9


def test_the_scale_is_that_of_equation_4():
    scale = smoothing_scale(torch.tensor([4.0, 9.0]), torch.tensor([1.0, 4.0]), alpha=0.5)
    assert torch.allclose(scale, torch.tensor([2.0, 1.5]))


@pytest.mark.parametrize(("activation", "weight"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_silent_channel_keeps_its_scale(activation, weight):
    assert smoothing_scale(torch.tensor([activation]), torch.tensor([weight]), 0.5).item() == 1.0


def test_the_stored_factor_is_the_one_that_was_applied(device):
    """Its weights, brought back, are the layer's: with the unrounded factor they would be off by up to 2**-9."""
    layer, stats = observed(96, 70, device)
    quantized = SmoothQuant().quantize(layer, stats, formats.W8A8)
    factor = quantized.input_factor.view(torch.bfloat16).float()
    step = quantized.weight_scale.view(torch.bfloat16).float()[:, None] * factor
    assert ((quantized.effective_weight() - layer.weight).abs() <= step * 0.5001 + SMALL * step).all()


def test_alpha_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        SmoothQuant(alpha=1.5)
