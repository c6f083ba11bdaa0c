"""A network that runs with its weights elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant_runtime.paged import page
from tests.support import relative_error

CAST = 1e-7  # nothing is computed in another way


class Network(nn.Module):
    """Has an embedding, a buffer that is saved, a parameter of its own, and layers inside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.shift = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("constant", torch.full((8,), 2.0), persistent=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words) * self.constant + self.shift - self.mean
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


@pytest.fixture
def stored():
    """As a checkpoint has it, in 16 bits."""
    return {key: tensor.bfloat16() for key, tensor in Network().state_dict().items()}


@pytest.fixture
def whole(stored, device):
    network = Network()
    network.load_state_dict({key: tensor.float() for key, tensor in stored.items()})
    return network.to(device)


def paged(stored, device, seen=None):
    network = Network().to(device)

    def read(key):
        if seen is not None:
            seen.append(sum(bool(p.isfinite().all()) for p in network.parameters()))
        return stored[key].clone()

    page(network, read, device)
    return network


def test_it_answers_what_the_whole_answers_as_often_as_it_is_asked(stored, whole, device):
    network, words = paged(stored, device), torch.arange(6, device=device)
    with torch.inference_mode():
        for _ in range(2):
            got = network(words)
            assert got.dtype == torch.float32
            assert relative_error(got, whole(words)) < CAST


def test_one_layer_is_there_at_a_time(stored, device):
    seen = []
    network = paged(stored, device, seen)
    seen.clear()
    network(torch.arange(6, device=device))
    assert len(seen) == len(list(network.parameters()))
    assert max(seen) == 1 + 1  # the network's own parameter, and a bias behind its weight's reading
    assert not any(bool(p.isfinite().any()) for p in network.parameters())
    storage = {p.untyped_storage().nbytes() for p in network.parameters()}
    assert storage == {4}


def test_a_weight_that_is_asked_for_outside_of_its_layer_is_no_number(stored, device):
    network = paged(stored, device)
    assert network.norm.weight.shape == (8,)
    assert bool(network.norm.weight.isnan().all())
    assert network.norm.weight.device.type == torch.device(device).type


def test_a_layer_that_fails_lets_go_of_its_weights_too(stored, device):
    network = paged(stored, device)
    with pytest.raises(RuntimeError):
        network.blocks[0][0](torch.ones(3, 5, device=device))
    assert bool(network.blocks[0][0].weight.isnan().all())
