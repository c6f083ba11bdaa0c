import pytest

from quant_runtime import formats
from quant_runtime.methods.none import Keep
from tests.quant_runtime.layers import observed


def test_the_layer_stays_and_bits_are_refused(device):
    layer, stats = observed(8, 4, device)
    assert Keep().quantize(layer, stats, formats.W16A16) is layer
    with pytest.raises(ValueError, match="got W4A8"):
        Keep().quantize(layer, stats, formats.W4A8)
