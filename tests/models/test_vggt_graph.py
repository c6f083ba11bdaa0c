"""Few views launched as one. On a CPU with the stand-in of tests/quant_runtime/test_graphs.py."""

from functools import partial

import pytest
import torch

from models import vggt_graph
from models.vggt_blocks import pack_blocks
from models.vggt_maps import pass_maps
from quant_runtime import graphs
from quant_runtime.attention import PACKED_BLOCK, AttentionPlan, _orders
from quant_runtime.graphs import Reads
from quant_runtime.sparsity.always import always_kept
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.models.test_vggt_blocks import FLOAT32, PACKED, model
from tests.quant_runtime.test_graphs import Again
from tests.support import relative_error

SPARSE = AttentionPlan(TopK(0.5), dense_qk_bits=8, pv_bits=8)


@pytest.fixture
def made(device, monkeypatch):
    made = model()
    made.net.to(device)
    pack_blocks(made.net)
    pass_maps(made.net)
    made.launch_as_one()
    if device == "cpu":
        monkeypatch.setattr(graphs, "Recorded", partial(Again, made.by_graph.by_graph.states))
    return made


def scene(views, device):
    return torch.rand(1, views, 3, 42, 56, device=device)


def taps(made, forward, images, on_part=None):
    made.attention.start(1)
    made.inside_frames.start(1)
    with torch.inference_mode():
        return torch.stack(forward(images, on_part))


@pytest.mark.parametrize("plan", [PACKED, SPARSE], ids=["dense", "sparse"])
def test_scenes_launched_as_one_answer_what_they_answer_block_by_block(plan, made, device):
    made.attend(plan)
    for number in range(4):
        images = scene(3, device)
        want, density = taps(made, made.by_graph.plain, images), made.attention.density()
        got = taps(made, made.net.aggregator, images)
        assert made.by_graph.launched == (number > 1)
        assert torch.equal(got, want)
        assert made.attention.density() == density, "run.json says what ran"
        assert made.inside_frames.density().effective == 1


def test_many_views_run_block_by_block(made, device, monkeypatch):
    made.attend(PACKED)
    monkeypatch.setattr(vggt_graph, "MOST_TOKENS", 3 * 17)  # a view has 5 and 12
    for views, launched in ((3, True), (4, False)):
        for _ in range(3):
            taps(made, made.net.aggregator, scene(views, device))
        assert made.by_graph.launched == launched
    taps(made, made.net.aggregator, scene(3, device))
    assert not made.by_graph.launched, "many had the memory"


def test_heads_behind_few_views_are_launched_as_one_from_their_third_call_on(made, device):
    camera, dense = made.by_graph.heads
    told = []
    for number in range(3):
        images = scene(5, device)  # of chunks of two the last is of another size, and so of another recording
        with torch.inference_mode():
            made.attention.start(1)
            made.inside_frames.start(1)
            taps_of = made.by_graph.plain(images)
            want = [camera.function(tap[:, :, 0]) for tap in taps_of[-1:]]
            maps = [dense.function([t[0, i : i + 2] for t in taps_of], (42, 56), 14) for i in range(0, 5, 2)]
            got = made.net(images, chunk=2, on_step=lambda *step: told.append((step, dense.launched)))
        assert relative_error(got.pose_iterations, want[0]) < FLOAT32
        assert relative_error(got.depth[0], torch.cat(maps)[:, 0].exp()) < FLOAT32
        assert camera.launched == (number > 1)
        chunks = [launched for _, launched in told[-3:]]
        assert chunks == [number > 0, number > 0, number > 1], "two of a scene's chunks are alike, and one is not"
    steps = made.net.config.depth + 5
    assert [step for step, _ in told] == 3 * [(done, steps) for done in range(1, steps + 1)], "and told of one by one"


def test_heads_behind_many_views_run_one_by_one(made, device, monkeypatch):
    monkeypatch.setattr(vggt_graph, "MOST_TOKENS", 3 * 17)
    for views, launched in ((3, True), (4, False)):
        for _ in range(3):
            with torch.inference_mode():
                made.attention.start(1)
                made.inside_frames.start(1)
                made.net(scene(views, device), chunk=1)
        assert [head.launched for head in made.by_graph.heads] == 2 * [launched]
        assert [len(head._recorded) for head in made.by_graph.heads] == 2 * [int(launched)], "many need the memory"


def test_another_plan_is_recorded_anew(made, device):
    images = scene(3, device)
    for plan in (PACKED, SPARSE):
        made.attend(plan)
        for launched in (False, False, True):
            taps(made, made.net.aggregator, images)
            assert made.by_graph.launched == launched


def test_all_parts_are_told_of_when_all_are_done(made, device):
    told, depth = [], made.net.config.depth
    for _ in range(3):
        taps(made, made.net.aggregator, scene(3, device), lambda: told.append(len(made.attention.made)))
    assert told == [*range(depth + 1), *range(depth + 1), *[depth] * (depth + 1)]


def test_what_a_pass_reads_besides_its_weights_is_held(made, device):
    """The order in which tokens are gathered, which masks are always kept: both come from caches that drop them."""
    made.attend(SPARSE)
    images = scene(3, device)
    want = taps(made, made.by_graph.plain, images)
    with torch.inference_mode(), Reads() as reads:
        got = torch.stack(made.by_graph.plain(images))
    assert torch.equal(got, want)
    own = {id_of(t) for t in (*made.net.parameters(), *made.net.buffers(), images)}
    layout = TokenLayout(3, 3, 4, 5)
    cached = [_orders(SPARSE.policy, layout, PACKED_BLOCK, images.device)]
    cached += [mask for mask in always_kept(layout, PACKED_BLOCK, False, images.device) if mask is not None]
    assert {id_of(tensor) for tensor in cached} <= reads.held.keys()
    assert not {id_of(tensor) for tensor in got} & reads.held.keys()
    assert own & reads.held.keys()


def id_of(tensor):
    return tensor.untyped_storage()._cdata
