import pytest
import torch

from quant_runtime import formats
from quant_runtime.methods.quarot import QuaRot
from quant_runtime.methods.rtn import Rtn
from quant_runtime.quality import sqnr
from tests.quant_runtime.layers import observed
from tests.support import relative_error


def test_turning_the_outliers_brings_the_answer_closer(device):
    layer, stats = observed(128, 70, device)
    x = torch.randn(50, 128, device=device)
    x[:, 5] = 30  # measured: 9.2 dB against 17.1; a step of 4 bits leaves nothing of the other channels
    plain, turned = (method.quantize(layer, stats, formats.W4A4) for method in (Rtn(), QuaRot()))
    assert sqnr(layer(x), turned(x)) > sqnr(layer(x), plain(x)) + 5


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (128, 128)])
def test_blocks_are_the_largest_that_divide_the_inputs(inputs, block, device):
    layer, stats = observed(inputs, 8, device)
    assert QuaRot().quantize(layer, stats, formats.W4A8).spec.rotation == block
    assert QuaRot(block=16).quantize(layer, stats, formats.W4A8).spec.rotation == 16


def test_an_odd_number_of_inputs_is_rounded_as_it_is(device):
    layer, stats = observed(33, 8, device)
    turned, plain = (method.quantize(layer, stats, formats.W4A8) for method in (QuaRot(), Rtn()))
    assert turned.spec == plain.spec
    assert torch.equal(turned.qweight, plain.qweight)


def test_the_rotation_is_gone_from_the_effective_weight(device):
    layer, stats = observed(96, 70, device)
    quantized = QuaRot().quantize(layer, stats, formats.W8A8)
    assert (
        relative_error(quantized.effective_weight(), layer.weight.detach()) < 0.01
    )  # 8 bits round at 0.4 % of the largest


def test_the_seed_alone_draws_the_signs(device):
    layer, stats = observed(96, 70, device)
    signs = [QuaRot(seed=seed).quantize(layer, stats, formats.W4A8).input_signs for seed in (0, 0, 1)]
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="got 48"):
        QuaRot(block=48)
