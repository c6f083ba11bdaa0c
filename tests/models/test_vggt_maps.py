"""VGGT's dense heads by passes. On a CPU the passes are the ops' references."""

from dataclasses import replace

import pytest
import torch

from models.vggt_maps import pass_maps, tried, tried_last
from models.vggt_net import VGGT, places
from quant_runtime.kernels._versions import examined
from tests.models.test_vggt_net import FLOAT32, SMALL, loud, outputs
from tests.support import relative_error

BFLOAT16 = 0.01  # maps go through some 20 convolutions, each of an answer that was rounded once or twice; found: 0.006
SEEDS = 6  # over which fewer roundings show


@pytest.fixture
def net():
    return loud()


@pytest.mark.parametrize("size", [(56, 56), (28, 42), (42, 14)])
def test_heads_answer_by_passes_what_they_answered(size, net):
    images = torch.rand(1, 3, 3, *size)
    with torch.inference_mode():
        want = outputs(net(images, chunk=2))
        pass_maps(net)
        got = outputs(net(images, chunk=2))
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < FLOAT32, name
        assert got[name].dtype == torch.float32


def test_in_16_bits_they_are_nearer_to_what_is_meant(net):
    """Each map is rounded once where it was rounded two or three times."""
    head, size = net.depth_head, (28, 42)
    scenes = [[torch.randn(2, 5 + 6, 64) for _ in range(4)] for _ in range(SEEDS)]
    with torch.inference_mode():
        want = [head.mapped(taps, size, 14) for taps in scenes]
        last = head.scratch.output_conv2[2]
        head.to(torch.bfloat16, memory_format=torch.channels_last)
        last.float()
        before, after = [], []
        for taps, its in zip(scenes, want, strict=True):
            before.append(relative_error(head.mapped(taps, size, 14), its))
        pass_maps(net)
        for taps, its in zip(scenes, want, strict=True):
            after.append(relative_error(head.mapped(taps, size, 14), its))
    assert 0 < max(after) < BFLOAT16
    assert sum(after) < sum(before)


def test_a_network_without_a_point_head_has_one_to_change():
    without = VGGT(replace(SMALL, point_head=False)).eval()
    pass_maps(without)
    with torch.no_grad():
        assert without(torch.rand(1, 1, 3, 28, 28)).depth.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_self_test_tries_all_that_a_head_runs(kind, net):
    def seen(into):
        def note(op, device, args):
            given = tuple(value is not None and value is not False for value in args)
            resized = op.name == "map_pass" and args[1:3] != tuple(args[0].shape[2:])
            into.add((op.name, given, resized, args[0].shape[1]))
            return op.reference(*args)

        return note

    ran, tested = set(), set()
    pass_maps(net)
    with torch.inference_mode(), examined(seen(ran)):
        net(torch.rand(1, 1, 3, 28, 42))
    with torch.inference_mode(), examined(seen(tested)):
        for width in {*SMALL.dpt_channels, SMALL.dpt_features, SMALL.dpt_features // 2}:
            tried(width, kind, torch.device("cpu"))
        tried_last(2, kind, torch.device("cpu"))
    without_bias = {one for one in ran if one[0] == "map_pass" and not one[1][3]}  # the same, less a load
    assert len(without_bias) == 1
    assert ran - without_bias <= tested, "every width among them"


def test_places_are_made_once_and_serve_whoever_trains():
    with torch.inference_mode():
        made = places(3, 5, 8, (42, 70), torch.device("cpu"))
    assert places(3, 5, 8, (42, 70), torch.device("cpu"))[0] is made[0]
    assert not made[0].is_inference()
    assert [tuple(half.shape) for half in made] == [(5, 4), (3, 4)]
