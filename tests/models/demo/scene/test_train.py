import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from models import vggt_net
from models.cameras import unproject
from models.demo.scene import evaluate, render, scenes, textures, train

TINY = train.CONFIGS["tiny"]


def tiny_run(folder, steps, config=TINY, **options):
    folder.mkdir(exist_ok=True)
    run = train.start(config, "cpu")
    return run, train.train(run, folder, steps=steps, **options)


def target(count=2, views=3, size=28):
    drawn = scenes.draw(scenes.generator("train", 4, 0), count, views)
    return train.target_of(render.render(drawn, size, textures.load(), samples=1))


def test_the_loss_falls_by_half_and_a_model_comes_out(tmp_path):
    config = replace(TINY, stages=(train.Stage(1.0, 28, ((2, 8),)),), log_every=10)
    _, curve = tiny_run(tmp_path, 150, config)
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()] == curve
    net, left_out = vggt_net.load(tmp_path)
    assert left_out == []
    figures = evaluate.evaluate({"net": evaluate.predictor(net.float().eval())}, 2, 28, view_counts=(2,))["net"]
    assert figures["absrel"].value < figures["absrel constant depth"].value
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "model.safetensors").values())


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    first, _ = tiny_run(tmp_path / "a", 3)
    again, _ = tiny_run(tmp_path / "b", 3)
    other, _ = tiny_run(tmp_path / "c", 3, replace(TINY, seed=1))
    weights = [torch.cat([p.detach().flatten() for p in run.parameters]) for run in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_in_two_halves_is_the_run_in_one(tmp_path):
    whole, _ = tiny_run(tmp_path / "whole", 8)
    tiny_run(tmp_path / "first", 4, end=0.5)
    state = torch.load(tmp_path / "first" / "state.pt", weights_only=True)
    assert (state["step"], state["progress"]) == (4, 0.5)
    second, curve = tiny_run(tmp_path / "second", 4, begin=0.5, resume=state)
    assert curve[-1]["step"] == 8
    for one, two in zip(whole.parameters, second.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    for one, two in zip(whole.average, second.average, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_getting_ready_leaves_no_trace():
    run = train.start(TINY, "cpu")
    before = [p.detach().clone() for p in run.parameters]
    train.prepare(run, train.shapes_of(TINY, 0, 1), use_compile=False, use_graphs=False)
    assert all(torch.equal(one, two) for one, two in zip(before, run.parameters, strict=True))
    assert all(value.abs().sum() == 0 for state in run.optimizer.state.values() for value in state.values())
    assert run.totals.abs().sum() == 0


def test_a_budget_of_seconds_is_kept_and_runs_through_the_schedule(tmp_path, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(now)))  # every look at the clock takes a second
    _, curve = tiny_run(tmp_path, None, replace(TINY, log_every=1), seconds=50.0)
    assert curve[-1]["seconds"] < 50
    assert curve[0]["progress"] < 0.2
    assert curve[-1]["progress"] > 0.8
    assert {row["size"] for row in curve} == {28, 56}
    with pytest.raises(ValueError, match="either"):
        train.train(train.start(TINY, "cpu"), tmp_path)


def test_the_schedule_rises_falls_and_widens():
    config = train.TrainConfig()
    rates = [train.learning_rate(config, step / 1000) for step in range(1001)]
    assert max(rates) == pytest.approx(config.peak_lr, rel=1e-3)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(config.peak_lr * config.last_lr)
    assert (train.spread_at(config, 0.0), train.spread_at(config, 0.9)) == (config.spread[0], scenes.SPREAD)
    assert [train.stage_at(config, p) for p in (0.0, 0.59, 0.61, 1.0)] == [0, 0, 1, 1]
    assert sum(stage.share for stage in config.stages) == pytest.approx(1.0)


def test_every_shape_of_a_stage_has_as_many_pictures():
    """So that what is compiled for the tokens of one is compiled for all."""
    for stage in train.TrainConfig().stages:
        assert len({views * count for views, count in stage.shapes}) == 1


def test_targets_are_in_the_first_cameras_frame_and_have_mean_distance_one():
    truth = target()
    torch.testing.assert_close(truth.points.norm(dim=-1).flatten(1).mean(1), torch.ones(2))
    identity = torch.tensor([0, 0, 0, 0, 0, 0, 1.0])
    torch.testing.assert_close(truth.pose[:, 0, :7], identity.expand(2, 7), atol=1e-6, rtol=0)
    extrinsics, intrinsics = train.evaluate.decode_pose(truth.pose, (28, 28))
    torch.testing.assert_close(unproject(truth.depth, extrinsics, intrinsics), truth.points, atol=1e-4, rtol=1e-4)


def test_losses_vanish_for_the_truth_and_only_for_it():
    truth = target()
    assert train.camera_loss(truth.pose.expand(4, -1, -1, -1), truth.pose) == 0
    assert train.camera_loss(truth.pose.expand(4, -1, -1, -1) + 0.1, truth.pose) > 0
    depth = truth.depth.flatten(0, 1)
    ones = torch.ones_like(depth)
    assert train.depth_loss(depth, ones, depth) == 0
    assert train.depth_loss(depth * 1.1, ones, depth) > 0.05
    assert train.depth_loss(depth * 1.1, ones * 2, depth) > train.depth_loss(depth * 1.1, ones, depth) - 0.2


def test_later_iterations_weigh_more():
    pose = torch.zeros(1, 2, 9)
    errors = [train.camera_loss(torch.eye(4)[k].view(4, 1, 1, 1).expand(4, 1, 2, 9), pose) for k in range(4)]
    torch.testing.assert_close(torch.stack(errors) / errors[3], torch.tensor([0.216, 0.36, 0.6, 1.0]))


def test_a_probe_that_reads_the_truth_has_no_loss():
    truth = target(2, 3, 28)
    probe = train.Probe(TINY.net)
    places = [3, 10]
    want = torch.stack([truth.points[:, :, y::14, x::14] for y in places for x in places], dim=4)
    want = want.permute(0, 1, 2, 3, 4, 5).flatten(4).flatten(2, 3)  # [B, S, patches, 12]
    probe.norm, probe.linear = torch.nn.Identity(), torch.nn.Identity()
    tap = torch.cat((torch.zeros(2, 3, 5, 12), want), dim=2)
    assert probe.loss(tap, truth) < 1e-6
    assert probe.loss(tap + 1, truth) > 0.1


def test_a_matcher_that_knows_the_places_beats_one_that_does_not():
    truth = target(4, 2, 112)
    matcher = train.Matcher(TINY.net)
    matcher.norm, matcher.linear = torch.nn.Identity(), torch.nn.Identity()
    middle = truth.points[:, :, 7::14, 7::14].flatten(2, 3)  # where each patch's middle lies
    # cos of the angle between (p, 1) lifted onto a paraboloid: largest for equal places
    lifted = torch.cat((middle, torch.ones_like(middle[..., :1]) * 0.2), dim=-1)
    special = torch.zeros(4, 2, 5, 4)
    matcher.sharpness.data.fill_(200.0)
    with torch.no_grad():
        knowing = matcher.loss(torch.cat((special, lifted), dim=2), truth)
        guessing = matcher.loss(torch.randn(4, 2, 69, 4), truth)
    assert knowing < 2.5
    assert guessing > 4


def test_alike_queries_and_keys_start_equal_in_global_blocks_only():
    run = train.start(replace(TINY, alike=True), "cpu")
    for block in run.net.aggregator.global_blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)
        assert torch.equal(query, key)
    query, key, _ = run.net.aggregator.frame_blocks[0].attn.qkv.weight.chunk(3)
    assert not torch.equal(query, key)


def test_the_per_token_halves_of_a_block_compile_without_a_break():
    run = train.start(TINY, "cpu")
    block = run.net.aggregator.global_blocks[0]
    rope = vggt_net.rope_table(2, 2, 5, 32, torch.device("cpu"))
    x = torch.randn(2, 9, 32)
    before, after = (
        torch.compile(part, backend="eager", fullgraph=True) for part in (vggt_net.Block.before, vggt_net.Block.after)
    )
    with torch.no_grad():
        for got, want in zip(before(block, x, rope), block.before(x, rope), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(after(block, x, x), block.after(x, x))


def test_a_compiler_that_fails_is_named_and_gone_without(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        def fail(*inner):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    _, curve = tiny_run(tmp_path, 5, use_compile=True)
    assert "COMPILE FAILED, GOING ON UNCOMPILED: RuntimeError: no compiler here" in capsys.readouterr().out
    assert len(curve) == 1


def test_fields_are_set_from_the_command_line_and_unknown_ones_refused():
    config = train.configured("demo", ["peak_lr=1e-3", "spread=[10, 60]", "stages=[[1.0, 112, [[2, 8]]]]"])
    assert (config.peak_lr, config.spread) == (1e-3, (10, 60))
    assert config.stages == (train.Stage(1.0, 112, ((2, 8),)),)
    with pytest.raises(ValueError, match=r"peak_lr, .*got peek_lr=1"):
        train.configured("demo", ["peek_lr=1"])


def test_the_demo_network_fits_its_file():
    with torch.device("meta"):
        count = sum(p.numel() for p in vggt_net.VGGT(train.DEMO).parameters())
    assert count * 2 < 11 * 2**20


def test_the_program_runs_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "models.demo.scene.train", "--config", "tiny", "--steps", "2", "--device", "cpu"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json", "state.pt"}
