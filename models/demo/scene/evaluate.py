"""How well a VGGT reconstructs held-out demo scenes, and what knowing nothing would score.

    python -m models.demo.scene.evaluate MODEL_FOLDER --scenes 64 --size 224 --out results.jsonl

Poses: AUC@30/15/5; depth: AbsRel; both as models/scene_metrics.py has them, per scene, averaged over scenes.

Controls, on the same scenes: the best constant relative pose, searched on training scenes; the model with every later
view taken from another scene (`another scene`: with that scene's own cameras; `another scene, same cameras`: only the
contents are exchanged, so that all that one picture tells of its camera stays true); one constant depth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from models import vggt_net
from models.cameras import decode_pose
from models.demo.scene import render, scenes, textures
from models.scene_metrics import abs_rel, auc, pose_errors, relative_poses

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


def evaluate(
    predict: Predict,
    count: int,
    size: int,
    device: str = "cpu",
    seed: int = 0,
    view_counts: tuple[int, ...] = VIEW_COUNTS,
) -> dict[str, float]:
    """All figures over `count` held-out scenes for each number of views in `view_counts`."""
    pyramid = textures.load().to(device)
    constant = tuple(part.to(device) for part in best_constant_pose())
    rows: dict[str, list[Tensor]] = {}

    def note(name: str, values: Tensor) -> None:
        rows.setdefault(name, []).append(values.double().cpu())

    for views in view_counts:
        for drawn, exchanged in held_out(count, views, size, seed, device):
            true, other = render.render(drawn, size, pyramid), render.render(exchanged, size, pyramid)
            want = relative_poses(true.extrinsics)

            def errors(images: Tensor, want: tuple[Tensor, Tensor] = want) -> tuple[Tensor, Tensor]:
                extrinsics, depth = predict(images)
                return pose_errors(relative_poses(extrinsics), want), depth

            found, depth = errors(true.images)
            foreign = torch.cat((true.images[:, :1], true.images[:, 1:].roll(1, 0)), dim=1)
            same_cameras = torch.cat((true.images[:, :1], other.images[:, 1:]), dim=1)
            for threshold in THRESHOLDS:
                note(f"auc{threshold}", auc(found, threshold))
            note(f"auc30 {views} views", auc(found, 30))
            note("auc30 best constant pose", auc(pose_errors(constant, want), 30))
            note("auc30 another scene", auc(errors(foreign)[0], 30))
            note("auc30 another scene, same cameras", auc(errors(same_cameras)[0], 30))
            note("median pose error", found.median(dim=1).values)
            note("absrel", abs_rel(depth, true.depth))
            note("absrel constant depth", abs_rel(torch.ones_like(true.depth), true.depth))
    return {name: float(torch.cat(values).mean()) for name, values in rows.items()}


def predictor(net: vggt_net.VGGT) -> Predict:
    @torch.no_grad()
    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        got = net(images)
        if got.depth is None:
            raise ValueError("evaluation needs a network with a depth head")
        return decode_pose(got.pose, images.shape[-2:])[0], got.depth

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a VGGT on held-out demo scenes.")
    parser.add_argument("model", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes for each number of views")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append one line of JSON for each figure")
    arguments = parser.parse_args()

    net, _ = vggt_net.load(arguments.model)
    net = net.float().eval().to(arguments.device)
    figures = evaluate(predictor(net), arguments.scenes, arguments.size, arguments.device, arguments.seed)
    case = {"scenes": arguments.scenes * len(VIEW_COUNTS), "size": arguments.size, "seed": arguments.seed}
    for name, value in figures.items():
        line = json.dumps({"bench": "vggt_held_out", "case": case, "metric": name, "value": round(value, 4)})
        print(line)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
