"""What is launched as one. Recording needs a GPU: on a CPU a stand-in for it runs the same function anew and tells the
states nothing, which shows what is recorded when, and what is told of it."""

from functools import partial

import pytest
import torch

from quant_runtime import graphs
from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.graphs import ByGraph
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK

LAYOUT = TokenLayout(2, 10, 12)
LAYERS = 3


class Again:
    """As a recording answers, and no call of `states` is told."""

    def __init__(self, states, function, given, beside=None):
        self.states, self.function = states, function
        function(*given)

    def __call__(self, given):
        before = [(state, state.mark()) for state in self.states()]
        answer = self.function(*given)
        for state, mark in before:
            state.back_to(mark)
        return answer


def refusing(function, given, beside=None):
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


def test_the_second_pass_of_a_kind_is_recorded_and_launched_as_one_from_then_on(recorded, device):
    state = AttentionState(AttentionPlan(TopK(0.5), warmup=0.25))
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    assert passes(by_graph, state, device, 3, step=1) == [False, True, True]
    assert passes(by_graph, state, device, 2, step=0) == [False, True], "a dense step is another kind"
    assert passes(by_graph, state, device, 2, step=3) == [True, True]
    by_graph.forget()
    assert passes(by_graph, state, device, 2) == [False, True]


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
        for _ in range(2):
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
    assert passes(by_graph, state, device, 3) == [False, False, False]
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.message
