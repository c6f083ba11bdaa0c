import json

import torch
from torch import nn

from models.demo import training

ROUGHLY_ONE = 0.35  # five Newton-Schulz steps leave singular values between 0.65 and 1.25


def test_the_rate_rises_stays_and_falls_to_zero_with_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    clock = training.Clock(100, warm=0.1, cool=0.4)
    rates = []
    for now[0] in (0.0, 5.0, 10.0, 50.0, 60.0, 80.0, 100.0, 130.0):
        rates.append(round(clock.rate, 6))
    assert rates == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_swapping_twice_changes_nothing_and_once_gives_the_average():
    layer = nn.Linear(3, 2)
    average = training.Average(layer.parameters(), decay=0.5)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    after = layer.weight.detach().clone()
    average.update()
    average.swap()
    assert not torch.equal(layer.weight, after)
    assert torch.all((layer.weight >= before) & (layer.weight <= after))
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), after)


def test_muon_steps_along_the_orthogonal_factor_of_the_gradient():
    for shape in ((6, 4), (4, 6)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        training.Muon([p], lr=1.0).step()
        step = -p.detach() / (0.2 * max(shape) ** 0.5)
        u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
        assert torch.linalg.svdvals(step).sub(1).abs().max() < ROUGHLY_ONE
        assert torch.linalg.svdvals(u.T @ step @ vt.T).sub(1).abs().max() < ROUGHLY_ONE


def test_a_curve_is_a_line_of_json_a_measurement(tmp_path, capsys):
    curve = training.Curve(tmp_path / "new" / "curve.jsonl", training.Clock(10))
    curve.write(step=1, loss=0.5)
    curve.write(step=2, loss=0.25)
    lines = [json.loads(line) for line in (tmp_path / "new" / "curve.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
