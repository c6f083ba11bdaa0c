"""How large the published networks are, and how large their compressed ones will be: counted without their tensors."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

from models import registry
from models.published import PARTS, PUBLISHED
from models.video import linear_inside
from quant_runtime.convert import prepare
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec

GIB = 2**30


def size(network) -> float:
    """GiB of its tensors, floats in 16 bits."""
    tensors = network.state_dict().values()
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors) / GIB


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_parameters_are_those_that_it_says(published):
    counted = sum(parameter.numel() for parameter in published.on_meta().parameters())
    assert round(counted / 1e9, 4) == published.parameters


@pytest.mark.parametrize(
    "part", [part for parts in PARTS.values() for part in parts.values()], ids=lambda part: part.kind
)
def test_parameters_of_what_does_not_shrink_are_those_that_it_says(part):
    with torch.device("meta"):
        if kind := getattr(diffusers, part.kind, None):
            made = kind(**part.config)
        else:
            kind = getattr(transformers, part.kind)
            made = kind(kind.config_class(**part.config))
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e9, 4) == part.parameters


@pytest.mark.parametrize(
    ("name", "gib", "ratio"),
    [
        ("wan-2.1-1.3b", 0.701, 3.77),
        ("wan-2.1-14b", 6.994, 3.81),
        ("wan-2.1-i2v-14b", 7.990, 3.82),
        ("wan-2.2-t2v-a14b", 6.994, 3.81),  # of each expert
        ("wan-2.2-i2v-a14b", 6.995, 3.80),
        ("wan-2.2-ti2v-5b", 2.462, 3.78),
        ("hunyuan-video", 6.489, 3.68),
        ("cogvideox-2b", 0.810, 3.90),
        ("cogvideox-5b", 2.631, 3.94),
    ],
)
def test_in_4_bits_it_has_the_size_that_the_papers_reach(name, gib, ratio):
    """HunyuanVideo 3.68 and Wan 14B 3.8 in QuantSparse (arXiv:2509.23681), CogVideoX-5B 3.94 in S²Q-VDiT."""
    published = PUBLISHED[name]
    network = published.on_meta()
    full = size(network)
    layers = linear_inside(network, registry.family(published.family).model.blocks)
    prepare(network, dict.fromkeys(layers, LinearSpec(QuantFormat.parse("w4a8"), scaled=True)))
    assert (round(size(network), 3), round(full / size(network), 2)) == (gib, ratio)
