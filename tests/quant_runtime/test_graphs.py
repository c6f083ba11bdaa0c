"""What is launched as one. Recording needs a GPU: on a CPU a stand-in for it runs the same function anew and tells the
states nothing, which shows what is recorded when, and what is told of it."""

from functools import partial

import pytest
import torch

from quant_runtime import graphs
from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.graphs import ByGraph, Reads, Recorded
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK

LAYOUT = TokenLayout(2, 10, 12)
LAYERS = 3


class Again:
    """As a recording answers, and no call of `states` is told."""

    def __init__(self, states, function, given, beside=None, compiled=False):
        self.states, self.function = states, function
        function(*given)

    def __call__(self, given):
        before = [(state, state.mark()) for state in self.states()]
        answer = self.function(*given)
        for state, mark in before:
            state.back_to(mark)
        return answer


def refusing(function, given, beside=None, compiled=False):
    function(*given)
    raise RuntimeError("operation not permitted when stream is capturing\nand more of it")


@pytest.fixture
def recorded(device, monkeypatch):
    """Makes what a CPU records with: a GPU has the real one."""

    def stand_in(by_graph):
        if device == "cpu":
            monkeypatch.setattr(graphs, "Recorded", partial(Again, by_graph.states))
        return by_graph

    return stand_in


def network(state, x):
    for layer in range(LAYERS):
        x = x + attend(x, x, x, layer=layer, layout=LAYOUT, state=state)
    return {"out": x}


def heads(device):
    return torch.randn(1, 2, LAYOUT.tokens, 64, device=device)


def passes(by_graph, state, device, number, step=0):
    """Whether each of so many passes at this step was launched as one; all answer what the function answers."""
    launched = []
    for _ in range(number):
        x = heads(device)
        state.start(4)
        state.at(step)
        want, density = network(state, x)["out"], state.density()
        state.start(4)
        state.at(step)
        assert torch.equal(by_graph(x)["out"], want)
        assert state.density() == density
        assert state.call(0, LAYOUT).branch == 1, "the pass that follows in this step is of the next branch"
        launched.append(by_graph.launched)
    return launched


def test_a_pass_is_recorded_behind_its_second_and_launched_as_one_from_then_on(recorded, device):
    state = AttentionState(AttentionPlan(TopK(0.5), warmup=0.25))
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    assert passes(by_graph, state, device, 4, step=1) == [False, False, True, True]
    assert passes(by_graph, state, device, 3, step=0) == [False, False, True], "a dense step is another kind"
    assert passes(by_graph, state, device, 2, step=3) == [True, True]
    by_graph.release()
    assert passes(by_graph, state, device, 2) == [False, True], "a kind that was seen is recorded behind its next"
    by_graph.forget()
    assert passes(by_graph, state, device, 3) == [False, False, True]


def test_what_is_recorded_was_just_run_whatever_ran_between(recorded, device):
    """A recording finds what its function caches, and not that it has been dropped since its first call."""
    cache, ran = {}, []

    def function(x):
        ran.append(len(x) in cache)
        cache.setdefault(len(x), True)
        return {"out": x + 1}

    by_graph = recorded(ByGraph(function, tuple, lambda x: True))
    by_graph(torch.zeros(3, device=device))
    cache.clear()
    by_graph(torch.zeros(3, device=device))
    assert ran == [False, False, True, True], "the second call, a rehearsal, and the recording"


@pytest.mark.parametrize(
    "plan",
    [AttentionPlan(TopK(0.5), residual=Residual(1)), AttentionPlan(Bands(0.5))],
    ids=["residual", "policy that chooses"],
)
def test_passes_that_depend_on_earlier_ones_are_not_recorded(plan, recorded, device):
    state = AttentionState(plan)
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    for step in range(3):
        state.at(step) if step else state.start(3)
        by_graph(heads(device))
        assert not by_graph.launched


def test_only_what_is_taken_is_recorded(recorded, device):
    state = AttentionState(AttentionPlan())
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: len(x) > 1))
    assert passes(by_graph, state, device, 3) == [False, False, False]


def test_the_recordings_that_were_not_used_for_longest_are_dropped(recorded, device):
    by_graph = recorded(ByGraph(lambda x, more: {"out": x + more}, tuple, lambda x, more: True))
    for size in (1, 2, 3, 4, 5):
        for _ in range(3):
            x = torch.randn(size, device=device)
            assert torch.equal(by_graph(x, more=2)["out"], x + 2)
        assert by_graph.launched
        by_graph(torch.randn(1, device=device), more=2)
    assert by_graph.launched, "this size was used all the time"
    by_graph(torch.randn(5, device=device), more=3)
    assert not by_graph.launched, "what is no tensor is another, too"
    assert len(by_graph._recorded) == graphs.KEPT


def test_what_cannot_be_recorded_runs_as_it_did_and_is_told_of_once(device, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "Recorded", refusing)
    state = AttentionState(AttentionPlan(TopK(0.5)))
    by_graph = ByGraph(partial(network, state), lambda: [state], lambda x: True)
    assert passes(by_graph, state, device, 4) == [False] * 4
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.message


def test_running_out_of_memory_is_the_callers_to_know_of(device, monkeypatch):
    def short(function, given, beside=None, compiled=False):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "Recorded", short)
    state = AttentionState(AttentionPlan(TopK(0.5)))
    by_graph = ByGraph(partial(network, state), lambda: [state], lambda x: True)
    passes(by_graph, state, device, 1)
    with pytest.raises(torch.OutOfMemoryError):
        by_graph(heads(device))
    assert len(state.made) == 2 * LAYERS, "calls that answered nothing are not told of"
    assert not by_graph.refused


def test_inference_mode_is_part_of_a_kind(recorded, device):
    by_graph = recorded(ByGraph(lambda x: x + 1, tuple, lambda x: True))
    x = torch.zeros(2, device=device)
    for launched in (False, False, True):
        with torch.inference_mode():
            by_graph(x)
        assert by_graph.launched == launched
    by_graph(x)
    assert not by_graph.launched


def test_a_recording_holds_what_it_reads_and_did_not_make(device):
    weight, order = torch.randn(4, 4, device=device), torch.tensor([1, 0], device=device)
    with torch.inference_mode(), Reads() as reads:
        x = torch.ones(2, 4, device=device)
        y = (x @ weight)[order]
        y.add_(1)
        z = y.t() * 2
    held = {tensor.untyped_storage()._cdata for tensor in reads.held.values()}
    assert held == {weight.untyped_storage()._cdata, order.untyped_storage()._cdata}
    assert z.shape == (4, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU")
def test_a_recording_outlives_the_caches_of_what_it_reads():
    order = [torch.tensor([2, 0, 1], device="cuda")]
    recording = Recorded(lambda x: x[order[0]], [torch.zeros(3, device="cuda")])
    order.clear()
    others = [torch.full((3,), 10**9, device="cuda") for _ in range(1000)]
    assert recording([torch.tensor([5.0, 6.0, 7.0], device="cuda")]).tolist() == [7, 5, 6]
    assert len(others) == 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU")
def test_what_waits_for_the_gpu_is_not_recorded_and_leaves_nothing_behind(caplog):
    by_graph = ByGraph(lambda x: x * float(x.sum()), tuple, lambda x: True)
    for value in (1.0, 2.0, 3.0):
        x = torch.full((4,), value, device="cuda")
        assert torch.equal(by_graph(x), 4 * value * x)
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU")
def test_a_recording_that_fails_gives_back_the_stream_the_memory_and_the_random_numbers():
    def fails(x):
        y = x + 1
        torch.cuda.current_stream().synchronize()
        return y

    torch.manual_seed(0)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        Recorded(fails, [torch.zeros(4, device="cuda")])
    assert torch.equal(torch.rand(4, device="cuda"), drawn)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.zeros(1 << 20, device="cuda").sum() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_recording_is_of_the_gpu_that_its_tensors_are_on():
    by_graph = ByGraph(lambda x: x + 1, tuple, lambda x: True)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert by_graph(torch.full((4,), value, device="cuda:1")).tolist() == [value + 1] * 4
    assert by_graph.launched
