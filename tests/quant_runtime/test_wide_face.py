"""Weights that lie in 16 bits behind parameters in float32."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn

from quant_runtime import wide_face
from quant_runtime.kernels import _cpu
from quant_runtime.wide_face import FacedEmbedding, FacedLinear, face, faceable
from tests.support import relative_error

FLOAT32 = 1e-6  # of the largest answer: the same sums, perhaps in another order


class Other(nn.Linear):
    pass


def network(dtype=torch.bfloat16):
    shared = nn.Linear(33, 40)
    layers = OrderedDict(
        words=nn.Embedding(70, 33, padding_idx=0), first=shared, again=nn.Sequential(shared), other=Other(33, 40),
        places=nn.Embedding(70, 33, max_norm=1.0), small=nn.Linear(3, 3),
    )  # fmt: skip
    return nn.Sequential(layers).to(dtype).requires_grad_(False)


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch):
    monkeypatch.setattr(wide_face, "LEAST", 10)


def test_large_layers_and_embeddings_can_and_nothing_that_may_be_more():
    assert faceable(network()) == ["words", "first", "again.0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_behind_the_face_it_answers_what_the_same_weights_answer_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(_cpu, "CHUNK_ELEMENTS", 7 * 33)  # 7 channels at a time, and then the rest
    got, ids = network(dtype), torch.tensor([[0, 5, 69], [5, 5, 1]])
    want = network(dtype)
    want.load_state_dict(got.state_dict())
    want.float()
    face(got, faceable(got))
    x = got.words(ids)
    assert torch.equal(x, want.words(ids))
    assert x.dtype == torch.float32
    got.first.bias = nn.Parameter(got.first.bias.float(), requires_grad=False)
    x[..., 3] *= 1000  # an outlier: x is not rounded to 16 bits
    for layer in (got.first, got.again[0]):
        y = layer(x)
        assert y.dtype == torch.float32
        assert relative_error(y, want.first(x).double()) < FLOAT32


def test_a_face_is_float32_of_the_same_shape_takes_no_memory_and_is_nobody_s_weight():
    made = network()
    shapes = {name: its.shape for name, its in made.named_parameters()}
    face(made, faceable(made))
    assert {name: its.shape for name, its in made.named_parameters()} == shapes
    for layer, kind in ((made.words, FacedEmbedding), (made.first, FacedLinear)):
        assert type(layer) is kind
        assert layer.behind.dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
        assert layer.weight.untyped_storage().nbytes() == 4
        assert layer.weight.isnan().all()
    assert made.again[0] is made.first
    assert type(made.other) is Other
    assert made.places.weight.dtype == torch.bfloat16


def test_what_is_wide_stays_as_it_is():
    made = network(torch.float32)
    face(made, faceable(made))
    assert [type(layer) for layer in (made.words, made.first)] == [nn.Embedding, nn.Linear]


class Padded(nn.Conv3d):
    """As autoencoders have them."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 7, 9)),
        (nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2)), (1, 4, 3, 7, 9)),
        (Padded(4, 6, 3, bias=False), (2, 4, 3, 7, 9)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_convolution_behind_its_face_answers_bit_for_bit_what_it_does_in_float32(layer, shape):
    got = nn.Sequential(layer.bfloat16().requires_grad_(False))
    want = deepcopy(got).float()
    assert faceable(got) == ["0"]
    face(got, ["0"])
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.float()
    assert layer.behind.dtype == torch.bfloat16
    assert layer.weight.isnan().all()
    assert {its.dtype for its in got.parameters()} == {torch.float32}
    x = torch.randn(shape)
    assert torch.equal(got(x), want(x))
