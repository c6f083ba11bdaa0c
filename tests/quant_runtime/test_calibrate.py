import pytest
import torch
from torch import nn

from quant_runtime.calibrate import Observer, fingerprint, observe


def network(device):
    return nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4, bias=False)).to(device)


def batches(device, count=3):
    return [torch.randn(5, 7, 12, device=device) for _ in range(count)]


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_the_largest_value_of_every_channel_is_found_over_all_runs(device):
    model, inputs = network(device), batches(device)
    stats = observe(model, ["0", "2"], lambda _: [model(x) for x in inputs])
    rows = torch.cat(inputs).reshape(-1, 12)
    assert torch.equal(stats["0"].absmax, rows.abs().amax(dim=0).cpu())
    assert torch.equal(stats["0"].weight_absmax, model[0].weight.abs().amax(dim=0).detach().cpu())
    assert stats["0"].tokens == stats["2"].tokens == 3 * 5 * 7
    assert hooks(model) == 0


def test_the_sample_is_drawn_from_all_rows_and_the_same_each_time(device):
    model, inputs = network(device), batches(device)
    stats = [observe(model, ["0"], lambda _: [model(x) for x in inputs], rows=60)["0"] for _ in range(2)]
    seen = torch.cat(inputs).reshape(-1, 12).cpu()
    places = [int((seen == row).all(dim=1).nonzero()) for row in stats[0].sample]
    assert torch.equal(stats[0].sample, stats[1].sample)
    assert len(set(places)) == 60, "no row twice"
    assert {place // 35 for place in places} == {0, 1, 2}, "from every run"


def in_turns(model, runs, order):
    """What an Observer sees of runs whose batches come in this order of the runs."""
    left = [iter(run) for run in runs]
    with Observer(model, ["0", "2"], rows=60) as seen, torch.inference_mode():
        for run in order:
            seen.run = run
            model(next(left[run]))
    return seen.stats()


def same(one, other):
    return fingerprint(one) == fingerprint(other) and all(
        torch.equal(one[name].weight_absmax, other[name].weight_absmax) for name in one
    )


def test_runs_leave_the_same_one_after_the_other_and_in_turns(device):
    model, runs = network(device), [batches(device), batches(device)]
    after = in_turns(model, runs, [0, 0, 0, 1, 1, 1])
    assert same(after, in_turns(model, runs, [0, 1, 0, 1, 0, 1]))
    assert same(after, in_turns(model, runs, [1, 1, 0, 1, 0, 0]))
    assert not same(after, in_turns(model, runs[::-1], [0, 0, 0, 1, 1, 1])), "a run has draws of its own"


def test_of_equal_draws_the_earlier_run_is_kept(device, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.zeros(count))
    model, runs = network(device), [batches(device), batches(device)]
    after = in_turns(model, runs, [0, 0, 0, 1, 1, 1])
    assert same(after, in_turns(model, runs, [1, 0, 1, 0, 1, 0]))


def test_what_was_seen_is_taken_out_and_gone_on_with(device):
    model, runs = network(device), [batches(device), batches(device)]
    with Observer(model, ["0", "2"], rows=60) as first, torch.inference_mode():
        for first.run in (0, 1):
            model(runs[first.run][0])
    state = {key: tensor.clone() for key, tensor in first.state().items()}
    with Observer(model, ["0", "2"], rows=60) as seen, torch.inference_mode():
        seen.go_on_from(state.get)
        for seen.run in (0, 1, 0, 1):
            model(runs[seen.run][1])
    want = in_turns(model, [[a, b, b] for a, b, _ in runs], [0, 1, 0, 1, 0, 1])
    assert same(seen.stats(), want)


def test_a_large_run_has_a_large_part_of_the_sample(device):
    model, large, small = network(device), torch.randn(1000, 12, device=device), torch.zeros(10, 12, device=device)
    sample = observe(model, ["0"], lambda _: [model(x) for x in (large, small)], rows=10)["0"].sample
    assert int((sample == 0).all(dim=1).sum()) <= 2, "one row in a hundred came from the small run"


def test_a_short_run_is_sampled_whole(device):
    model = network(device)
    stats = observe(model, ["0"], lambda _: model(torch.randn(3, 12, device=device)))
    assert stats["0"].sample.shape == (3, 12)


def test_layers_that_share_an_input_share_its_statistics(device):
    model = nn.ModuleDict({"q": nn.Linear(12, 8), "k": nn.Linear(12, 4), "o": nn.Linear(12, 4)}).to(device)
    x = torch.randn(9, 12, device=device)
    stats = observe(model, ["q", "k", "o"], lambda _: [layer(x) for layer in model.values()], shared=[("q", "k")])
    both = torch.cat([model["q"].weight, model["k"].weight]).abs().amax(dim=0).detach().cpu()
    assert torch.equal(stats["q"].weight_absmax, both)
    assert torch.equal(stats["k"].weight_absmax, both)
    assert not torch.equal(stats["o"].weight_absmax, both)


def test_hooks_are_gone_after_a_run_that_failed(device):
    model = network(device)
    with pytest.raises(ZeroDivisionError):
        observe(model, ["0", "2"], lambda _: 1 / 0)
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_calibrated_is_named(device):
    model = network(device)
    with pytest.raises(ValueError, match="never reached 2"):
        observe(model, ["0", "2"], lambda _: model[0](torch.zeros(1, 12, device=device)))
    with pytest.raises(ValueError, match="fed 0 a value that is not finite"):
        observe(model, ["0"], lambda _: model(torch.full((1, 12), float("nan"), device=device)))
    with pytest.raises(TypeError, match="1 is a GELU"):
        observe(model, ["1"], lambda _: None)


def test_the_fingerprint_tells_data_apart(device):
    model, inputs = network(device), batches(device)
    prints = [fingerprint(observe(model, ["0"], lambda _, x=x: model(x))) for x in (inputs[0], inputs[1], inputs[0])]
    assert prints[0] == prints[2] != prints[1]
