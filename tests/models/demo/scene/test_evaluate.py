import torch

from models.demo.scene import evaluate, render, scenes
from models.scene_metrics import abs_rel, auc, pose_errors, relative_poses
from tests.models.test_scene_metrics import turned_about_z


def drawn(count=200, views=4):
    return scenes.draw(scenes.generator("held-out", 9, 0), count, views)


def test_knowing_all_but_the_azimuth_scores_below_the_controls_gate():
    """What the scenes must guarantee: no cue of one picture makes a pose. This oracle has all other cues exactly."""
    true = drawn(600).extrinsics
    where = -(true[..., :3].transpose(-1, -2) @ true[..., 3:])[..., 0]
    azimuth = torch.rad2deg(torch.atan2(where[..., 1], where[..., 0]))
    aligned = true.double()
    aligned[..., :3] = aligned[..., :3] @ turned_about_z(azimuth - azimuth[:, :1])
    want = relative_poses(true)
    errors = pose_errors(relative_poses(aligned), want)
    assert auc(errors, 30).mean() < 20
    assert auc(pose_errors(evaluate.best_constant_pose(candidates=200), want), 30).mean() < 10


def test_a_constant_depth_is_far_off():
    depth = render.render(drawn(24, 3), 28, evaluate.textures.load(), samples=1).depth
    assert abs_rel(torch.ones_like(depth), depth).mean() >= 0.30


def test_an_oracle_scores_full_marks_and_the_controls_do_not():
    """The whole program with a predictor that recognises the held-out pictures and knows their cameras."""
    size, known = 14, {}
    for true, _ in evaluate.held_out(4, 3, size, seed=0, device="cpu"):
        views = render.render(true, size, evaluate.textures.load())
        for image, extrinsics, depth in zip(
            views.images.flatten(0, 1), true.extrinsics.flatten(0, 1), views.depth.flatten(0, 1), strict=True
        ):
            known[tuple(image.flatten().tolist())] = (extrinsics, depth)

    def predict(images):
        lost = (torch.eye(4)[:3], torch.ones(size, size))
        answers = [known.get(tuple(image.flatten().tolist()), lost) for image in images.flatten(0, 1)]
        extrinsics, depth = (torch.stack(part).unflatten(0, images.shape[:2]) for part in zip(*answers, strict=True))
        return extrinsics, depth

    found = evaluate.evaluate({"oracle": predict, "again": predict}, 4, size, view_counts=(3,))
    figures = {name: figure.value for name, figure in found["oracle"].items()}
    assert figures["auc30"] == figures["auc5"] == 100
    assert figures["absrel"] == 0
    assert figures["absrel constant depth"] > 0.2
    assert figures["auc30 another scene"] < 40
    assert figures["auc30 first view of another scene"] < 40
    assert found["again"].keys() < found["oracle"].keys()
    (row,) = (row for row in evaluate.rows(found) if row["case"] == "again" and row["metric"] == "auc5")
    assert (row["value"], row["baseline"], row["samples"]) == (100, {"name": "oracle", "value": 100}, 4)
