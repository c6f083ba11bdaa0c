"""The measuring programs themselves, on clips whose truth is known and on a model of a few kilobytes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from models import registry
from models.demo.video import bench, captions, evaluate, render
from models.wan import Wan
from quant_runtime.kernels._cpu import cpu_has_bfloat16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    Wan().tiny(folder)
    return folder


def rows(path) -> dict[tuple[str, str], dict]:
    return {(row["case"], row["metric"]): row for row in map(json.loads, path.read_text().splitlines())}


def test_a_rendered_clip_is_right_and_right_for_no_other_caption():
    clips = captions.held_out(seed=0)[slice(0, 64, 16)]
    video = render.render(clips, 17, 192, 320)
    for i in range(4):
        frames = ((video[i] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
        mine, other = (clips[slice(n, n + 1)] for n in (i, (i + 1) % 4))
        assert evaluate.right(evaluate.as_video(frames), mine) == (True, True)
        assert evaluate.right(evaluate.as_video(frames), other) != (True, True)


def test_obedience_counts_what_was_filmed_and_what_was_rendered(tiny):
    model = evaluate.opened(tiny, "cpu")
    found = {row["metric"]: row for row in evaluate.obedience(model, seeds=1, count=2)}
    assert found["colour and direction"]["samples"] == 2
    assert found["colour and direction"]["value"] == 0, "random weights film nothing that moves"
    assert found["temporal energy, ratio to rendered"]["value"] > 0


@pytest.fixture
def instead(tiny, monkeypatch):
    """Both programs on the tiny checkpoint, and no allocator setting that would outlive the test."""
    monkeypatch.setattr(registry, "checkpoint", lambda name: tiny)
    for program in (bench, evaluate):
        monkeypatch.setattr(program, "keep_freed_memory", lambda: True)


def test_compression_is_held_against_full_precision_and_another_seed(instead, tmp_path, monkeypatch):
    words = ["evaluate", "compression", "--seeds", "1", "--prompts", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    found = rows(tmp_path / "demo_video_compression-cpu.jsonl")
    half = {"bfloat16"} if cpu_has_bfloat16() else set()
    assert {case for case, _ in found} == {"another seed", *half, *evaluate.RECIPES}
    worst = found["another seed", "PSNR"]["value"]
    assert worst < found["W8A8 by RTN, dense", "PSNR"]["value"]
    assert all(row["command"].startswith("python -m models.demo.video.evaluate") for row in found.values())


def test_residuals_are_held_against_the_dense_film_of_the_same_weights(instead, tmp_path, monkeypatch):
    words = ["evaluate", "residual", "--seeds", "1", "--prompts", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(evaluate, "RANK", 4)
    monkeypatch.setattr(evaluate, "WARMUP", 0.6)  # two of the three steps
    evaluate.main()
    found = rows(tmp_path / "demo_video_residual-cpu.jsonl")
    assert len(found) == 10
    error = found["density 0.15, second order, rank 4", "PSNR"]["error"]
    assert error["effective_density"] > 0.7
    assert error["lost"] > 0
    assert "lost" not in found["density 0.15, no residual", "PSNR"]["error"]


def test_policies_are_held_against_the_dense_film_of_the_same_weights(instead, tmp_path, monkeypatch):
    words = ["evaluate", "policies", "--seeds", "1", "--prompts", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    found = rows(tmp_path / "demo_video_policies-cpu.jsonl")
    assert len(found) == 2 * len(evaluate.POLICIES) + 3
    for row in found.values():
        assert 0 < row["error"]["sparse"] <= 1
        assert row["error"]["sparse"] <= row["error"]["effective_density"], "a step of three is dense"


def test_the_benchmark_times_all_eight_and_weighs_the_weights(instead, tmp_path, monkeypatch):
    words = ["bench", "--rounds", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    found = rows(tmp_path / "demo_video_speed-cpu.jsonl")
    loops = {case for case, metric in found if metric == "denoise loop"}
    assert len(loops) == 8
    assert found[bench.BASELINE, "denoise loop"]["error"] == {"psnr": None, "effective_density": 1.0}
    linears = found["W4A8", "block linears"]
    assert linears["value"] < linears["baseline"]["value"] / 2
