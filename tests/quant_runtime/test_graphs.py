"""What is launched as one. Recording needs a GPU: on a CPU a stand-in for it runs the same function anew and tells the
states nothing, which shows what is recorded when, and what is told of it."""

from functools import partial

import pytest
import torch

from quant_runtime import graphs
from quant_runtime.attention import AttentionPlan, AttentionState, SharedState, attend
from quant_runtime.graphs import ByGraph, Reads, Recorded
from quant_runtime.in_place import taken
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import Blocks, PackedBlocks, Seen, TokenLayout
from quant_runtime.sparsity.topk import TopK
from tests.support import relative_error

LAYOUT = TokenLayout(2, 10, 12)
LAYERS = 3
ALIKE = 1e-3  # of films whose caches a GPU adds up in another order each time; another cache is another film


def places(tensors):
    return {tensor.untyped_storage()._cdata for tensor in tensors}


class Again:
    """As a recording answers, and no call of `states` is told. It reads where the recording would, or says so."""

    def __init__(self, states, function, given, beside=None, compiled=False, others=()):
        self.states, self.function = states, function
        kept = places(tensor for state in states() for tensor in state.kept())
        assert places(others) == kept, "nobody else's memory is left to others"
        _, self.reads = self._run(given)

    def __call__(self, given):
        before = [(state, state.mark()) for state in self.states()]
        answer, reads = self._run(given)
        assert reads == self.reads
        for state, mark in before:
            state.back_to(mark)
        return answer

    def _run(self, given):
        with Reads() as reads:
            answer = self.function(*given)
        return answer, places(reads.held.values()) - places(one for one in given if isinstance(one, torch.Tensor))


def refusing(function, given, beside=None, compiled=False, others=()):
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
    ids=["refreshes", "policy that chooses"],
)
def test_passes_that_change_what_is_kept_are_not_recorded(plan, recorded, device):
    state = AttentionState(plan)
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    state.start(9)
    for step in range(0, 9, 2):
        state.at(step)
        by_graph(heads(device))
        assert not by_graph.launched


def film(state, run, inputs, guided):
    """What attention has added, and of each step whether its passes were launched as one: one, or guided two."""
    state.start(len(inputs))
    answers, launched = [], []
    for step, x in enumerate(inputs):
        state.at(step)
        passes = []
        for given in (x, -x) if guided else (x,):
            answers.append(run(given)["out"] - given)
            passes.append(getattr(run, "launched", False))
        launched.append(all(passes))
        assert launched[-1] == any(passes)
    return answers, launched


@pytest.mark.parametrize("pv_bits", [8, 16])
@pytest.mark.parametrize("guided", [False, True])
def test_sparse_passes_read_what_the_last_refresh_has_kept_wherever_they_were_recorded(
    guided, pv_bits, recorded, device
):
    """Each of the passes of a step has a residual of its own."""
    residual = Residual(3, rank=8)
    state = AttentionState(AttentionPlan(TopK(0.5), warmup=0.2, pv_bits=pv_bits, residual=residual, dense_layers=(1,)))
    inputs = [heads(device) for _ in range(14)]
    want, _ = film(state, partial(network, state), inputs, guided)
    before = state.density()
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    for firsts in ((3, 4), (3,)):  # another film has other places, and a kind that was seen is recorded behind its next
        got, launched = film(state, by_graph, inputs, guided)
        refreshes = (0, 1, 2, 6, 10)
        assert launched == [step not in (*refreshes, *firsts) for step in range(len(inputs))]
        for one, other in zip(got, want, strict=True):
            assert relative_error(one, other) < ALIKE
        assert state.density().effective == before.effective
        assert [its.step for its in state.density().residual.refreshes] == [*refreshes]
        by_graph.release()


def test_the_last_step_of_a_schedule_is_dense_and_reads_nothing_that_was_kept(recorded, device):
    plan = AttentionPlan(TopK(0.5), residual=Residual(1, rank=8))
    state = AttentionState(plan)
    state.start(7)
    phases = []
    for step in range(7):
        state.at(step)
        phases.append(state.phase())
        network(state, heads(device))
    assert phases == [None, phases[1]] * 3 + [None]
    with Reads() as reads:
        network(state, heads(device))
    assert not reads.held.keys() & places(state.kept())
    by_graph = recorded(ByGraph(partial(network, state), lambda: [state], lambda x: True))
    inputs = [heads(device) for _ in range(7)]
    want, _ = film(state, partial(network, state), inputs, guided=False)
    for _ in range(3):
        got, launched = film(state, by_graph, inputs, guided=False)
        assert all(relative_error(one, other) < ALIKE for one, other in zip(got, want, strict=True))
    assert launched == [False] * 3 + [True, False, True, False], "it is seen, and recorded anew in each film"


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("freeze", [False, True])
def test_what_sparse_passes_read_of_what_is_kept_stays_where_it_is(order, bits, freeze, device):
    residual = Residual(1, order=order, rank=8, bits=bits, freeze=freeze)
    state = AttentionState(AttentionPlan(TopK(0.5), residual=residual))
    read, phases, where = [], [], []
    for _ in range(2):
        state.start(6)
        for step in range(6):
            state.at(step)
            kept = places(state.kept())
            phases.append(state.phase())
            where.append(state.place())
            with Reads() as reads:
                network(state, heads(device))
            read.append(reads.held.keys() & kept)
    assert [phase is None for phase in phases] == [True, False] * 6, "refreshes"
    assert len(set(phases)) == 2, "sparse passes are alike, of another film too"
    assert where[1] == where[3] == where[5] != where[7] == where[9]
    assert read[1] == read[3] == read[5]
    assert len(read[1]) == LAYERS * ((2 if bits == 8 else 1) + 2 * freeze), "the residual, its scales, blocks, counts"


def test_a_sparse_pass_keeps_the_blocks_that_the_refresh_before_it_has_chosen(device):
    """Of several refreshes the last one's, with other queries each time."""
    policy = TopK(0.25, block=16)
    state = AttentionState(AttentionPlan(policy, residual=Residual(1, rank=8)))
    state.start(9)
    chosen: list[object] = []
    for step in range(8):
        state.at(step)
        call, x = state.call(0, LAYOUT), heads(device)
        if call.refresh:
            blocks = policy.blocks(Seen.of(x, x, 16), call, None)
            chosen.append(blocks.all_listed().tolist())
        else:
            frozen = state.chosen(call, lambda: pytest.fail("refreshes choose"))
            assert frozen.all_listed().tolist() == chosen[-1]
            assert frozen.counts.tolist() == blocks.counts.tolist()
        attend(x, x, x, layer=0, layout=LAYOUT, state=state)
    assert chosen[0] != chosen[1] != chosen[2]


def test_what_does_not_fit_is_not_taken():
    mine, theirs = torch.zeros(2, 3), torch.ones(2, 3)
    at = mine.data_ptr()
    assert taken([mine], [theirs])
    assert mine.data_ptr() == at
    assert mine.eq(1).all()
    for others in ([torch.zeros(3, 2)], [torch.zeros(2, 3, dtype=torch.int8)], [torch.zeros(2, 3)] * 2):
        assert not taken([mine], others)
    assert not taken([mine, torch.zeros(1)], [torch.zeros(2, 3), torch.zeros(2)])
    assert mine.eq(1).all(), "nothing is written then"
    with torch.inference_mode():
        made = torch.zeros(2, 3)
        assert taken([made], [theirs])
    assert not taken([made], [theirs])


def test_blocks_of_other_sizes_are_not_taken():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    kept, counts = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4), mask.sum(dim=3, dtype=torch.int32)
    packed = [PackedBlocks.of(Blocks(kept, counts, *sizes, 4)) for sizes in ((64, 64), (64, 64), (128, 64))]
    assert packed[0].take(packed[1])
    assert not packed[0].take(packed[2])
    counts += 1
    assert packed[0].counts.max() == 4, "a policy's own tensors are not written to"


@pytest.mark.parametrize("place", ["device", "host"])
def test_dense_steps_of_a_plan_with_a_residual_and_a_host_s_memory_are_not_recorded(place, recorded, device):
    """The few dense ones are not worth their memory, and from the host what is kept is brought elsewhere each time."""
    state = AttentionState(AttentionPlan(TopK(0.5), warmup=0.5, residual=Residual(2, rank=8)))
    state.start(12, place)
    phases = []
    for step in range(12):
        state.at(step)
        phases.append(state.phase())
        network(state, heads(device))
    assert phases[:6] == [None] * 6
    sparse = [phase for phase in phases[6:] if phase is not None]
    assert len(sparse) == (4 if place == "device" else 0)


def test_networks_that_take_turns_are_recorded_anew(monkeypatch, device):
    """What the first has kept is gone when it is its turn again, and its recordings are released at the next step."""
    plan = AttentionPlan(TopK(0.5), residual=Residual(2, rank=8))
    states = {name: AttentionState(plan) for name in ("high", "low")}
    shared = SharedState(states)
    runs = {
        name: ByGraph(partial(network, state), partial(list, [state]), lambda x: True) for name, state in states.items()
    }
    if device == "cpu":  # the stand-in is told of both
        monkeypatch.setattr(graphs, "Recorded", partial(Again, lambda: list(states.values())))
    turns = ["high"] * 5 + ["low"] * 5 + ["high"] * 5
    inputs = [heads(device) for _ in turns]

    def film(run_of):
        shared.start(len(turns))
        answers, launched = [], []
        for step, (name, x) in enumerate(zip(turns, inputs, strict=True)):
            shared.at(step)
            answers.append(run_of[name](x)["out"] - x)
            launched.append(getattr(run_of[name], "launched", False))
            for run in runs.values():
                run.release_stale()
        return answers, launched

    want, _ = film({name: partial(network, state) for name, state in states.items()})
    got, launched = film(runs)
    assert all(relative_error(one, other) < ALIKE for one, other in zip(got, want, strict=True))
    assert launched.count(True) > 2
    assert not runs["low"]._recorded, "its turn is over"


def test_what_cannot_be_recorded_is_told_of_once_in_all_films(device, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "Recorded", refusing)
    state = AttentionState(AttentionPlan(TopK(0.5), residual=Residual(3, rank=8)))
    by_graph = ByGraph(partial(network, state), lambda: [state], lambda x: True)
    for _ in range(3):
        film(state, by_graph, [heads(device) for _ in range(8)], guided=False)
    assert len(caplog.records) == 1


def test_a_recording_does_not_hold_what_refreshes_write(device):
    """Networks that take turns give it back when it is another's turn."""
    kept, order = torch.zeros(3, device=device), torch.tensor([1, 0, 2], device=device)
    with Reads([kept]) as reads:
        (kept + 1)[order]
    assert [one.data_ptr() for one in reads.held.values()] == [order.data_ptr()]


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
    def short(function, given, beside=None, compiled=False, others=()):
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
