"""How well VGGTs reconstruct held-out demo scenes, and what knowing nothing would score.

    python -m models.demo.scene.evaluate demo-scene artifacts/scene-w8a8 --scenes 16

A MODEL is a checkpoint's folder or name, in float32, or an artifact's, as a worker opens it; all see the same pictures.
Poses: AUC@30/15/5; depth: AbsRel; both as models/scene_metrics.py has them, per scene, averaged over scenes; `error` is
the mean's standard error. Rows as in quant_runtime/report.py, into docs/results/demo_scene-DEVICE.jsonl.

Controls, on the same scenes and of the first model: the best constant relative pose, searched on training scenes; every
later view taken from another scene, with that scene's own cameras (`another scene`); every later view showing another
scene from where it stood (`first view of another scene`), which keeps true all that one picture tells of its camera:
there only pairs with the first view count, since the later views are true pictures of one scene; one constant depth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import load, registry, vggt_net
from models.cameras import decode_pose
from models.demo.scene import render, scenes, textures
from models.scene_metrics import abs_rel, auc, pose_errors, relative_poses
from models.vggt import Vggt, VggtModel
from quant_runtime import artifact, report

THRESHOLDS = (30, 15, 5)
VIEW_COUNTS = (2, 3, 4, 6, 8)
Predict = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # images [B, S, 3, H, W] to extrinsics [B, S, 3, 4] and depth [B, S, H, W]


def held_out(
    count: int, views: int, size: int, seed: int, device: str, batch: int = 8
) -> Iterator[tuple[scenes.Scenes, scenes.Scenes]]:
    """Batches of held-out scenes, and each again with the contents of its neighbour and its own cameras."""
    for start in range(0, count, batch):
        source = scenes.generator("held-out", seed, views * 100_000 + start)
        drawn = scenes.draw(source, max(2, min(batch, count - start)), views)
        cameras = {"extrinsics", "fov", "gain"}
        rolled = replace(
            drawn, **{f.name: getattr(drawn, f.name).roll(1, 0) for f in fields(drawn) if f.name not in cameras}
        )
        yield drawn.to(device), rolled.to(device)


def best_constant_pose(seed: int = 0, candidates: int = 1024, pairs: int = 4096) -> tuple[Tensor, Tensor]:
    """The relative pose of a training pair that, given for every training pair, has the best AUC@30."""
    drawn = scenes.draw(scenes.generator("train", seed, 0), pairs // 6 + 1, 4)
    rotation, translation = (part.flatten(0, 1)[:pairs] for part in relative_poses(drawn.extrinsics))
    scores = [
        auc(pose_errors((rotation[i], translation[i]), (rotation, translation)), 30)
        for i in range(min(candidates, pairs))
    ]
    best = int(torch.stack(scores).argmax())
    return rotation[best], translation[best]


@dataclass(frozen=True)
class Figure:
    """A mean over scenes."""

    value: float
    standard_error: float
    scenes: int


def evaluate(
    predictors: Mapping[str, Predict],
    count: int,
    size: int,
    device: str = "cpu",
    seed: int = 0,
    view_counts: tuple[int, ...] = VIEW_COUNTS,
) -> dict[str, dict[str, Figure]]:
    """Name of the model → name of the figure, over `count` held-out scenes for each number of views in `view_counts`.

    The controls are among the first model's.
    """
    pyramid = textures.load().to(device)
    constant = tuple(part.to(device) for part in best_constant_pose())
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in predictors}

    for views in view_counts:
        first = torch.triu_indices(views, views, offset=1, device=device)[0] == 0  # pairs with the first view
        for drawn, exchanged in held_out(count, views, size, seed, device):
            true = render.render(drawn, size, pyramid)
            want = relative_poses(true.extrinsics)
            for number, (name, predict) in enumerate(predictors.items()):
                rows = found[name]

                def note(name: str, values: Tensor, rows: dict[str, list[Tensor]] = rows) -> None:
                    rows.setdefault(name, []).append(values.double().cpu())

                def errors(
                    images: Tensor, predict: Predict = predict, want: tuple[Tensor, Tensor] = want
                ) -> tuple[Tensor, Tensor]:
                    extrinsics, depth = predict(images)
                    return pose_errors(relative_poses(extrinsics), want), depth

                poses, depth = errors(true.images)
                for threshold in THRESHOLDS:
                    note(f"auc{threshold}", auc(poses, threshold))
                note(f"auc30 {views} views", auc(poses, 30))
                note("median pose error", poses.median(dim=1).values)
                note("absrel", abs_rel(depth, true.depth))
                if number > 0:
                    continue
                note("auc30 best constant pose", auc(pose_errors(constant, want), 30))
                note("absrel constant depth", abs_rel(torch.ones_like(true.depth), true.depth))
                foreign = torch.cat((true.images[:, :1], true.images[:, 1:].roll(1, 0)), dim=1)
                note("auc30 another scene", auc(errors(foreign)[0], 30))
                other = render.render(exchanged, size, pyramid)
                apart = errors(torch.cat((true.images[:, :1], other.images[:, 1:]), dim=1))[0]
                note("auc30 first view of another scene", auc(apart[:, first], 30))
                if views > 2:
                    note("auc30 first view of another scene, the other pairs", auc(apart[:, ~first], 30))
    return {name: {key: _figure(torch.cat(values)) for key, values in rows.items()} for name, rows in found.items()}


def _figure(values: Tensor) -> Figure:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return Figure(float(values.mean()), error, len(values))


def predictor(net: vggt_net.VGGT) -> Predict:
    @torch.no_grad()
    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        got = net(images)
        if got.depth is None:
            raise ValueError("evaluation needs a network with a depth head")
        return decode_pose(got.pose, images.shape[-2:])[0], got.depth

    return predict


def opened(folder: Path, device: str) -> Predict:
    """An artifact as a worker opens it, a checkpoint in float32; one scene at a time, as they are served."""
    if (folder / artifact.MANIFEST).is_file():
        model = load.load(folder, device)
        assert isinstance(model, VggtModel)
    else:
        model = Vggt().load(folder, device, torch.float32)

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        each = [model.predict(scene[None], lambda done, of: None) for scene in images]
        extrinsics, _ = decode_pose(torch.cat([one.pose for one in each]), images.shape[-2:])
        return extrinsics, torch.cat([one.depth for one in each])

    return predict


UNITS = {"absrel": ("", "lower"), "median pose error": ("degrees", "lower")}  # of the figures that begin so


def rows(found: Mapping[str, Mapping[str, Figure]]) -> Iterator[dict[str, Any]]:
    """Each model's figures, held against the first's."""
    reference = next(iter(found))
    for name, figures in found.items():
        for metric, figure in figures.items():
            unit, better = next((kind for start, kind in UNITS.items() if metric.startswith(start)), ("%", "higher"))
            baseline = None if name == reference else (reference, found[reference][metric].value)
            error = {"standard_error": report.rounded(figure.standard_error)}
            print(f"{name:24} {metric:52} {figure.value:8.3f} ± {figure.standard_error:.3f}")
            yield report.row(
                name, metric, figure.value, unit, better, samples=figure.scenes, baseline=baseline, error=error
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.scene.evaluate", description="Measure VGGTs on held-out demo scenes."
    )
    parser.add_argument("models", nargs="*", default=["demo-scene"], help="checkpoints and artifacts")
    parser.add_argument("--scenes", type=int, default=16, help="held-out scenes for each number of views")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    folders = {name: registry.checkpoint(name) for name in given.models}
    predictors = {Path(name).name: opened(folder, given.device) for name, folder in folders.items()}
    found = evaluate(predictors, given.scenes, given.size, given.device, given.seed)
    device = torch.device(given.device)
    path = given.out / f"demo_scene-{device.type}.jsonl"
    report.write(path, "demo_scene", rows(found), ["python", "-m", "models.demo.scene.evaluate", *sys.argv[1:]], device)
    print(path)


if __name__ == "__main__":
    main()
