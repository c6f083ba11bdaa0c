"""What the measurement of whole artifacts relies on, tried on a small one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from torch import nn

from models.published import PARTS, PUBLISHED, Part
from service import bench, bench_whole
from service.bench_whole import Asked
from tests.models.synthetics import WAN

MIB = 2**20
SMALL = {
    "text_encoder": Part("UMT5EncoderModel", {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
                                              "num_layers": 2}, 0.0),
    "vae": Part("AutoencoderKLWan", {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
                0.0),
}  # fmt: skip


def test_a_whole_artifact_is_made_opened_in_each_way_and_gone(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "small", WAN)
    monkeypatch.setitem(PARTS, "wan", SMALL)
    monkeypatch.setattr(bench, "TRIED", bench.BLOCK)
    rows = [*bench_whole.rows("small", Asked(tmp_path, "cpu", layers=3))]
    ways = ("hashes checked", "hashes not checked", "hashes checked, no bfloat16")
    assert [(row["case"], row["metric"]) for row in rows] == [
        (f"small and 3 layers of its text encoder, {way}", metric)
        for way in ways
        for metric in ("host memory before", "host memory above that", "peak memory", "time", "loaded")
    ]
    before, above, most = rows[:3]
    assert most["value"] >= before["value"] > 0
    assert above["value"] >= 0
    whole = most["baseline"]["value"] * bench.GIB
    assert whole > sum(most["error"].values()) > whole / 2
    assert most["error"].keys() == {"transformer", *SMALL}
    assert not [*tmp_path.iterdir()]


def test_network_and_text_encoder_are_as_deep_as_was_asked_for(tmp_path):
    whole, small = Asked(tmp_path, "cpu"), Asked(tmp_path, "cpu", blocks=3, layers=4)
    for name, depth in (("wan-2.1-1.3b", "num_layers"), ("hunyuan-video", "num_hidden_layers")):
        network, parts = bench_whole.described(name, small)
        assert parts["text_encoder"].config[depth] == 4
        made = network.on_meta()
        kinds = [blocks for blocks in made.children() if isinstance(blocks, nn.ModuleList)]
        assert {len(blocks) for blocks in kinds} == {3}
        assert len(kinds) == (1 if name.startswith("wan") else 2)
        assert bench_whole.described(name, whole) == (PUBLISHED[name], PARTS[network.family])


def test_what_is_held_for_a_moment_is_seen():
    begun, done = threading.Event(), threading.Event()

    def hold():
        begun.wait()
        held = np.ones(256 * MIB, dtype=np.uint8)
        threading.Event().wait(10 * bench_whole.WATCHED_EVERY)
        del held
        done.set()

    threading.Thread(target=hold).start()
    before = bench_whole.resident()
    with bench_whole.watched() as seen:
        begun.set()
        done.wait()
    assert 250 * MIB < max(seen) - before < 300 * MIB


def test_a_process_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(ValueError, match="ended with 1"):
        bench_whole._opened_aside(tmp_path / "nothing", "checked", "cpu")
