"""Runs that go through one network on the disk together."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import nn

from quant_runtime.lockstep import Lockstep, blocks
from quant_runtime.paged import page

RUNS, STEPS, WIDTH = 3, 2, 8


class Block(nn.Module):
    """Has a list of its own, as a T5's has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)])
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor, words: torch.Tensor, rope: tuple[torch.Tensor]) -> torch.Tensor:
        return x + self.gain * self.layers[1](self.layers[0](x * rope[0] + words).sin())


class Network(nn.Module):
    """Has what is ahead of its blocks and behind them, and goes on with a tensor that no block is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("turn", torch.randn(WIDTH))
        self.inside, self.time = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, 4)

    @property
    def device(self) -> torch.device:
        return self.turn.device

    def forward(self, x: torch.Tensor, words: torch.Tensor, step: float) -> tuple[torch.Tensor]:
        x, time = self.inside(x), self.time(torch.tensor([step], device=x.device).expand(len(x), 1))
        for block in self.blocks:
            x = block(x, words, (self.turn,))
        return (self.last(x * self.scale + time),)


@pytest.fixture
def stored():
    return Network().state_dict()


def words_of(device):
    return torch.linspace(-1, 1, WIDTH, device=device)  # given to every pass, by every run


def program(network, run, words, films, guidance=True):
    """As a pipeline does it: what comes of a step is what the next one starts from."""

    def film():
        x = torch.linspace(-1, 1, 20, device=words.device).view(5, 4) * (run + 1)
        for step in range(STEPS):
            seen = network(x, words, float(step))[0]
            if guidance:
                away = network(x, words - 1, float(step))[0]
                seen = away + 2 * (seen - away)
            x = x - 0.3 * seen
        films[run] = x

    return film


def alone(stored, device, guidance=True):
    network, films = Network().to(device), {}
    network.load_state_dict(stored)
    for run in range(RUNS):
        with torch.inference_mode():
            program(network, run, words_of(device), films, guidance)()
    return films


class Together:
    """The same programs in lockstep."""

    def __init__(self, stored, device, folder, guided=2):
        self.read, self.turns, self.rounds, self.films = [], [], [], {}
        self.network = Network().to(device)
        self.words = words_of(device)
        self.folder, self.guided = folder, guided
        self.pages = page(self.network, lambda key: self.read.append(key) or stored[key].clone(), device)
        self.read.clear()

    def go(self, known=lambda run, number: None, memo=lambda: lambda: None, programs=None, runs=RUNS):
        with Lockstep(self.folder, self.turns.append, memo) as together:
            gates = [together.gate(run, self.pages, self.guided) for run in range(runs)]
            made = [
                (programs or program)(gate, run, self.words, self.films, self.guided == 2)
                for run, gate in enumerate(gates)
            ]
            together.go(made, known, self.rounds.append)


@pytest.fixture
def together(stored, device, tmp_path):
    return Together(stored, device, tmp_path)


def test_every_run_comes_to_what_it_comes_to_alone(together, stored, device):
    together.go()
    want = alone(stored, device)
    assert all(torch.equal(together.films[run], want[run]) for run in range(RUNS))
    assert together.words.equal(words_of(device))


def test_runs_of_one_pass_a_step_too(stored, device, tmp_path):
    together, want = Together(stored, device, tmp_path, guided=1), alone(stored, device, guidance=False)
    together.go()
    assert all(torch.equal(together.films[run], want[run]) for run in range(RUNS))


def test_a_step_of_all_runs_reads_every_tensor_once(together, stored):
    together.go()
    parameters = [name for name, _ in Network().named_parameters()]
    assert sorted(together.read) == sorted(STEPS * parameters)
    assert [sorted(its) for its in together.rounds] == [
        [(run, 2 * step + number) for run in range(RUNS) for number in range(2)] for step in range(STEPS)
    ]


def test_a_block_of_weights_is_in_memory_at_a_time(together):
    """And with the last one what is behind it."""
    kept = []
    for block in together.network.blocks:
        block.register_forward_hook(lambda *_: kept.append(len(together.pages._kept)))
    together.go()
    own, head = len(list(Block().parameters())), 2
    assert [max(kept[start : start + RUNS * 2]) for start in range(0, len(kept), RUNS * 2)] == STEPS * [
        own,
        own,
        own + head,
    ]


def test_what_a_pass_holds_is_in_memory_while_it_goes_and_in_a_file_while_others_do(together):
    made, alive = [], []

    def hear(_, inputs, output):
        made.append(weakref.ref(output))
        others = {ref().untyped_storage().data_ptr() for ref in made[:-1] if ref() is not None}
        others -= {0, inputs[0].untyped_storage().data_ptr(), output.untyped_storage().data_ptr()}
        alive.append(len(others))

    for module in (*together.network.blocks, together.network.inside, together.network.time):
        module.register_forward_hook(hear)
    together.go()
    assert len(made) == RUNS * 2 * STEPS * 5
    assert max(alive) == 1, "of its own: what `time` answered goes past the blocks"


def test_the_file_has_no_name(together):
    seen = []
    for block in together.network.blocks:
        block.register_forward_hook(lambda *_: seen.append(list(together.folder.iterdir())))
    together.go()
    assert seen
    assert not any(seen)


def test_it_is_told_whose_turn_it_is_and_puts_back_what_a_pass_had_set(together):
    told, state = [], {"layout": None}

    def enter(_, args):
        state["layout"] = (float(args[0][0, 0]), float(args[1][0]))

    def memo():
        kept = state["layout"]
        return lambda: state.update(layout=kept)

    together.network.register_forward_pre_hook(enter)
    for block in together.network.blocks:
        block.register_forward_hook(lambda *_: told.append((together.turns[-1], state["layout"])))
    together.go(memo=memo)
    first = told[: RUNS * 2]
    assert len(set(first)) == RUNS * 2, "each of its own run, and each branch of its own"
    assert told[RUNS * 2 : RUNS * 4] == first, "the same at every block"


def test_answers_that_are_known_are_not_asked_for(together, stored, device, tmp_path):
    together.go()
    again = Together(stored, device, tmp_path)
    again.go(known=lambda run, number: together.rounds[0].get((run, number)))
    assert len(again.read) == len(together.read) / STEPS
    assert all(torch.equal(again.films[run], together.films[run]) for run in range(RUNS))
    assert [sorted(its) for its in again.rounds] == [sorted(together.rounds[1])]


def test_one_run_alone_leaves_its_activations_and_keeps_no_weights(stored, device, tmp_path, monkeypatch):
    together, want = Together(stored, device, tmp_path, guided=1), alone(stored, device, guidance=False)
    kept = []
    together.network.blocks[1].register_forward_hook(lambda *_: kept.append(together.pages._kept))
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda *_: pytest.fail("put away"))
    together.go(runs=1)
    assert torch.equal(together.films[0], want[0])
    assert kept == [None] * STEPS


def threads():
    return {thread.ident for thread in threading.enumerate()}


def test_what_fails_in_a_run_or_in_a_pass_ends_them_all(together, stored, device, tmp_path):
    before = threads()

    def fails(gate, run, *rest):
        film = program(gate, run, *rest)
        return film if run != 1 else lambda: film() or 1 / 0

    with pytest.raises(ZeroDivisionError):
        together.go(programs=fails)
    assert threads() == before

    def fail(*_):
        raise ValueError("a block that will not do")

    broken = Together(stored, device, tmp_path)
    broken.network.blocks[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="will not do"):
        broken.go()
    assert threads() == before
    assert not broken.rounds


def test_a_run_that_makes_fewer_passes_than_was_said_is_refused(together):
    def once(gate, run, words, films, guidance):
        return lambda: gate(torch.ones(5, 4, device=words.device), words, 0.0)

    with pytest.raises(RuntimeError, match="run 0 has ended ahead of the last of a step's 2 passes"):
        together.go(programs=once)


def test_an_answer_that_is_used_too_early_is_no_number(together):
    def early(gate, run, words, films, guidance):
        return lambda: gate(torch.ones(5, 4, device=words.device), words, 0.0)[0] + torch.ones(5, 4)

    with pytest.raises(RuntimeError, match="must match the size"):
        together.go(programs=early)


def test_blocks_are_what_the_outer_lists_hold():
    network = Network()
    assert blocks(network) == list(network.blocks)
