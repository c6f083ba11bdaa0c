"""Layers that stay in 16 bits among others in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant_runtime.kernels import _cpu
from quant_runtime.narrow_linear import LARGE, NarrowLinear, keep_narrow, narrowable
from tests.support import relative_error

FLOAT32 = 1e-6  # of the largest answer: the same sums, perhaps in another order


def layer(inputs, outputs, bias=True, dtype=torch.bfloat16):
    made = NarrowLinear(inputs, outputs, bias)
    made.weight.data = made.weight.data.to(dtype)
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 33), 5), ((2, 7, 100), 257), ((65, 96), 130)])
def test_it_answers_what_the_same_weights_answer_in_float32(shape, outputs, bias, dtype, monkeypatch):
    monkeypatch.setattr(_cpu, "CHUNK_ELEMENTS", 50 * shape[-1])  # 50 channels at a time, and then the rest
    made, x = layer(shape[-1], outputs, bias, dtype), torch.randn(shape)
    x[..., 3] *= 1000  # an outlier: x is not rounded to 16 bits
    want = nn.functional.linear(x.double(), made.weight.double(), None if made.bias is None else made.bias.double())
    got = made(x)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < FLOAT32


def test_of_16_bits_it_is_the_layer_that_it_was():
    made, x = layer(33, 5), torch.randn(4, 33, dtype=torch.bfloat16)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias.bfloat16()))


def test_large_linear_layers_become_it_and_no_others():
    class Other(nn.Linear):
        pass

    side = int(LARGE**0.5)
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Linear(side, side), nn.Linear(side, side - 1), Other(side, side), nn.Linear(1, LARGE)
        )
    assert narrowable(network) == ["0", "3"]
    weight = network[0].weight
    keep_narrow(network.eval(), ["0", "3"])
    assert [type(module) for module in network] == [NarrowLinear, nn.Linear, Other, NarrowLinear]
    assert network[0].weight is weight
    assert not network[0].training
