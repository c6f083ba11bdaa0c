"""Patterns of names choose formats, one layer at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant_runtime.formats import W3A8, W4A8, W8A8, W16A16
from quant_runtime.rules import Rule, formats


def network() -> nn.Module:
    """Eleven blocks of an attention and a feed-forward layer, behind an embedder that has one too."""
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(4, 4), "ff": nn.Linear(4, 4)}) for _ in range(11))
        return nn.ModuleDict({"embedder": nn.ModuleDict({"ff": nn.Linear(4, 4)}), "blocks": blocks})


INSIDE = [f"blocks.{i}.{name}" for i in range(11) for name in ("to_q", "ff")]


def chosen(*rules, default=W4A8):
    return formats(network(), INSIDE, default, [Rule(pattern, format_) for pattern, format_ in rules])


@pytest.mark.parametrize(
    ("pattern", "name", "does"),
    [
        ("ff.*", "blocks.3.ff.net.0.proj", True),
        ("ff", "blocks.3.ff.net.0.proj", False),
        ("ff", "blocks.3.ff", True),
        ("ff.*", "blocks.3.buff.net", False),
        ("blocks.1.*", "blocks.10.ff", False),
        ("blocks.[01].*", "blocks.1.ff", True),
        ("blocks.0.*", "single_blocks.0.ff", False),
        ("*blocks.0.*", "single_blocks.0.ff", True),
        ("to_?", "blocks.0.attn.to_q", True),
        ("To_q", "blocks.0.attn.to_q", False),
    ],
)
def test_a_pattern_is_of_the_whole_name_or_of_what_follows_a_dot(pattern, name, does):
    assert Rule(pattern, W8A8).matches(name) == does


def test_without_rules_all_layers_of_the_blocks_have_one_format():
    assert chosen() == dict.fromkeys(INSIDE, W4A8)


def test_the_last_rule_that_matches_wins():
    got = chosen(("ff", W8A8), ("blocks.0.*", W16A16), ("blocks.0.to_q", W3A8))
    assert [got[name] for name in INSIDE[:4]] == [W3A8, W16A16, W4A8, W8A8]


def test_a_rule_that_matches_in_the_blocks_leaves_embedders_alone():
    assert "embedder.ff" not in chosen(("ff", W8A8))


def test_a_rule_that_matches_only_outside_asks_for_these_layers_and_they_stand_in_the_networks_order():
    got = chosen(("embedder.*", W8A8))
    assert list(got) == ["embedder.ff", *INSIDE]
    assert (got["embedder.ff"], got["blocks.0.ff"]) == (W8A8, W4A8)
    assert "embedder.ff" not in chosen(("embedder.*", W8A8), ("embedder.*", W16A16))


def test_a_pattern_of_no_layer_is_named_with_one_layer_of_each_kind():
    with pytest.raises(ValueError, match=r"'fff\.\*' matches no linear layer; .*0.to_q, blocks.0.ff, embedder.ff"):
        chosen(("fff.*", W8A8))
