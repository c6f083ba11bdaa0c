"""What the measurement of large checkpoints relies on, tried on a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from models import stream, synthetic, tiny
from models.published import PUBLISHED
from models.wan import Wan
from quant_runtime import report
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W4A8
from quant_runtime.methods import Rtn
from service import bench
from tests.models.synthetics import WAN, nothing

MIB = 2**20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    synthetic.write(WAN, folder / "checkpoint", nothing)
    words = {"base": "synthetic", "device": "cpu", "on_bytes": nothing}
    out = folder / "artifact"
    return out, stream.compress(Wan(), folder / "checkpoint", Rtn(), W4A8, AttentionPlan(), out, **words)


def test_the_layers_of_a_manifest_and_what_stays_add_up_to_the_files(made):
    folder, manifest = made
    whole, parts = bench.added_up(folder, manifest)
    assert whole == (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert sum(parts.values()) == whole
    assert parts["layers"] == manifest.layer_bytes()[0] > parts["headers"] > 0


def test_a_manifest_that_says_otherwise_is_refused_by_the_layer_s_name(made):
    folder, manifest = made
    name, layer = next(iter(manifest.layers.items()))
    other = manifest.model_copy(update={"layers": manifest.layers | {name: layer.model_copy(update={"bytes": 7})}})
    with pytest.raises(ValueError, match=f"do not add up: .*{name}"):
        bench.added_up(folder, other)


MEASURED = """
import json, sys
from service import bench
idle = bench.ran(sys.executable, "-c", "pass")
large = bench.ran(sys.executable, "-c", "import time; held = b'x' * (900 << 20); time.sleep(0.2)")
print(json.dumps([idle.peak, large.peak, large.seconds]))
"""


def test_a_process_is_measured_alone():
    """From a process as small as the measurement's own: this one may be larger than what it would measure."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    idle, large, seconds = json.loads(done.stdout)
    assert large > 900 * MIB > idle
    assert seconds >= 0.2


def test_what_a_process_reads_and_writes_is_counted(tmp_path):
    (tmp_path / "in").write_bytes(bytes(5 * MIB))
    moves = "from pathlib import Path; Path('out').write_bytes(Path('in').read_bytes() * 2)"
    done = bench.ran("sh", "-c", f'cd {tmp_path} && exec {sys.executable} -c "{moves}"')
    assert 5 * MIB <= done.read < 6 * MIB
    assert 10 * MIB <= done.written < 11 * MIB


def test_calibrating_is_measured_with_all_that_it_reads_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "small", WAN)
    rows = [*bench.calibrate("small", tmp_path, 2, 1, replace(tiny.LIMITS, steps=2))]
    read, written, *_ = rows
    assert [row["metric"] for row in rows] == ["read", "written", "time", "peak memory"]
    assert read["value"] > read["baseline"]["value"] > 0
    assert written["value"] > 0
    assert not [*tmp_path.iterdir()]


def test_a_process_that_fails_ends_the_measurement():
    with pytest.raises(ValueError, match="ended with 3"):
        bench.ran(sys.executable, "-c", "raise SystemExit(3)")


def test_the_disk_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TRIED", 4 * bench.BLOCK)
    disk = bench.tried(tmp_path)
    assert disk.reads > 0
    assert disk.writes > 0
    assert disk.seconds(read=int(disk.reads), written=int(2 * disk.writes)) == pytest.approx(3, rel=1e-3)
    assert not list(tmp_path.iterdir())


def test_a_load_is_a_row_for_each_way_and_opens_what_is_there(made, monkeypatch):
    monkeypatch.setattr(bench, "TRIED", bench.BLOCK)
    rows = list(bench.load([made[0]]))
    assert [(row["case"], row["metric"]) for row in rows] == [
        (f"artifact, {how}", metric)
        for how in ("imports alone", "hashes checked", "hashes not checked", "as a worker on a CPU has it")
        for metric in ("peak memory", "time")
    ]
    assert all(row["value"] > 0 for row in rows)
    size = (made[0] / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    held = [row["baseline"] for row in rows if row["metric"] == "peak memory"]
    assert held == [None] + 3 * [{"name": "the artifact", "value": report.rounded(size / bench.GIB)}]
