import pytest
import torch
from torch import nn

from models import convolutions
from tests.support import relative_error

FLOAT32_ROUNDING = 1e-6  # of sums in another order


@pytest.mark.parametrize(
    "options", [{}, {"stride": (1, 2, 2)}, {"padding": (0, 1, 1), "bias": False}, {"groups": 2, "dilation": (2, 1, 1)}]
)
def test_onednn_computes_what_torch_does(options):
    layer = nn.Conv3d(4, 6, 3, **options).requires_grad_(False)
    x = torch.randn(1, 4, 5, 11, 9)
    want = layer(x)
    convolutions.by_onednn(nn.Sequential(layer))
    assert relative_error(layer(x), want) < FLOAT32_ROUNDING
    assert torch.backends.mkldnn.is_available() == ("_conv_forward" in vars(layer))


def test_other_layers_are_let_be():
    layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1, padding="same"), nn.Conv3d(1, 1, 1).half())
    convolutions.by_onednn(layers)
    assert not any("_conv_forward" in vars(layer) for layer in layers)
