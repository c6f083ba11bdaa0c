"""python -m models.demo.scene.bench: the demo VGGT's pass over the views of one scene, float32, bfloat16 and artifacts.

One held-out scene, its pictures on the device; all take turns, round after round. `value` is the median of the passes'
milliseconds, whole and by stage: encoder, aggregator, heads (camera and depth). `error` is what stands between a pass
and float32's: the median pair's pose in degrees, and the mean relative difference of the depth. Rows as in
quant_runtime/report.py, into docs/results/demo_scene_speed-DEVICE.jsonl; the sizes of the weights go with them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from models import compress, load, registry
from models.cameras import decode_pose
from models.compress import Recipe
from models.demo import weights
from models.demo.scene import render, scenes, textures
from models.scene_metrics import pose_errors, relative_poses
from models.vggt import Vggt, VggtModel
from models.vggt_net import Prediction
from quant_runtime import report
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels._cpu import keep_freed_memory
from quant_runtime.methods import QuaRot, Rtn, SmoothQuant

WEIGHTS = "model.safetensors"
STAGES = ("encoder", "aggregator", "heads")
# Quantized layers come with int8 q and k. All blocks are kept: half of them would cost five points of AUC@30.
INT8 = AttentionPlan(dense_qk_bits=8)
RECIPES = {
    "W8A8 rtn": Recipe(Rtn(), QuantFormat.parse("w8a8"), INT8, judging_samples=0),
    "W4A8 rtn": Recipe(Rtn(), QuantFormat.parse("w4a8"), INT8, judging_samples=0),
    "W4A8 smoothquant": Recipe(SmoothQuant(), QuantFormat.parse("w4a8"), INT8, judging_samples=0),
    "W4A8 quarot": Recipe(QuaRot(), QuantFormat.parse("w4a8"), INT8, judging_samples=0),
}
BASELINES = ("float32", "bfloat16")  # ours are held against the faster of the two


def timed(model: VggtModel, images: Tensor) -> tuple[Prediction, dict[str, float]]:
    """One pass, and the seconds of each stage and of the whole."""
    marks = [time.perf_counter()]

    def step(done: int, of: int) -> None:
        if done in (1, 1 + model.net.config.depth, of):
            marks.append(time.perf_counter())

    got = model.predict(images, step)
    seconds = [after - before for before, after in pairwise(marks)]
    return got, dict(zip(STAGES, seconds, strict=True)) | {"whole pass": time.perf_counter() - marks[0]}


def rows(checkpoint: Path, device: str, rounds: int, views: int, aside: Path) -> Iterator[dict[str, Any]]:
    family = Vggt()
    models = {
        "float32": family.load(checkpoint, device, torch.float32),
        "bfloat16": family.load(checkpoint, device, torch.bfloat16),
    }
    for name, recipe in RECIPES.items():
        made = compress.compress(
            family, checkpoint, recipe, aside / name, base="demo-scene", device=device, on_progress=lambda *_: None
        )
        yield from weights.rows(name, checkpoint / WEIGHTS, aside / name / WEIGHTS, made)
        opened = load.load(aside / name, device, check=False)
        assert isinstance(opened, VggtModel)
        models[name] = opened
    side = models["float32"].net.config.img_size
    drawn = scenes.draw(scenes.generator("held-out", 1, 0), 1, views).to(device)
    images = render.render(drawn, side, textures.load().to(device)).images

    times: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    found: dict[str, Prediction] = {}
    for number in range(rounds + 2):  # the first two warm up
        for name, model in models.items():
            found[name], seconds = timed(model, images)
            if number >= 2:
                times[name].append(seconds)
    medians = {
        name: {stage: 1e3 * median(one[stage] for one in each) for stage in (*STAGES, "whole pass")}
        for name, each in times.items()
    }
    for name, stages in medians.items():
        baseline = min(BASELINES, key=lambda one: medians[one]["whole pass"]) if name not in BASELINES else "float32"
        for stage, milliseconds in stages.items():
            ratio = medians[baseline][stage] / milliseconds
            print(f"{name:20} {stage:12} {milliseconds:8.1f} ms  {ratio:5.2f}x {baseline}")
            faster = report.rounded(medians["float32"][stage] / milliseconds)
            spread = 1e3 * (max(one[stage] for one in times[name]) - min(one[stage] for one in times[name]))
            yield report.row(
                f"{views} views of {side}x{side}, {name}", stage, milliseconds, "ms", "lower", samples=rounds,
                baseline=(baseline, medians[baseline][stage]), spread=spread,
                error=apart(found[name], found["float32"], side) | {"times_as_fast_as_float32": faster}
                if stage == "whole pass" else None,
            )  # fmt: skip


def apart(got: Prediction, want: Prediction, side: int) -> dict[str, float]:
    assert got.depth is not None
    assert want.depth is not None
    poses = (relative_poses(decode_pose(one.pose, (side, side))[0]) for one in (got, want))
    return {
        "pose_difference": report.rounded(float(pose_errors(*poses).median())),
        "depth_difference": report.rounded(float(((got.depth - want.depth).abs() / want.depth).mean())),
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m models.demo.scene.bench", description="Times the demo VGGT.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    keep_freed_memory()  # for the baselines as for ours
    device = torch.device(given.device)
    path = given.out / f"demo_scene_speed-{device.type}.jsonl"
    command = ["python", "-m", "models.demo.scene.bench", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as aside:
        found = rows(registry.checkpoint("demo-scene"), given.device, given.rounds, given.views, Path(aside))
        report.write(path, "demo_scene_speed", found, command, device)
    print(path)


if __name__ == "__main__":
    main()
