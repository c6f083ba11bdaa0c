import torch

from models.cameras import relative_to_first, rotation_from_quaternion
from models.demo.scene import evaluate, render, scenes


def drawn(count=200, views=4):
    return scenes.draw(scenes.generator("held-out", 9, 0), count, views)


def turned_about_z(degrees):
    half = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64)) / 2
    zero = torch.zeros_like(half)
    return rotation_from_quaternion(torch.stack((zero, zero, half.sin(), half.cos()), dim=-1))


def test_the_truth_has_no_error_in_any_frame_and_scale():
    true = drawn().extrinsics
    moved = relative_to_first(true.double())
    moved[..., 3] *= 3.7
    errors = evaluate.pose_errors(evaluate.relative_poses(moved), evaluate.relative_poses(true))
    assert errors.max() < 1e-2  # float32 cameras
    assert evaluate.auc(errors, 30).min() == 100


def test_the_error_of_a_rotation_is_its_angle():
    t = torch.tensor([1.0, 0, 0]).double()
    for degrees in (0.001, 1.0, 29.5, 90.0, 179.0):
        error = evaluate.pose_errors((turned_about_z(degrees), t), (turned_about_z(0.0), t))
        torch.testing.assert_close(error, torch.tensor(degrees).double(), rtol=1e-6, atol=0)


def test_the_error_of_a_translation_is_the_angle_between_lines():
    eye = torch.eye(3).double()
    for degrees, want in ((20.0, 20.0), (90.0, 90.0), (160.0, 20.0), (180.0, 0.0)):
        t = torch.tensor([1.0, 0, 0]).double()
        error = evaluate.pose_errors((eye, turned_about_z(degrees) @ t * 5), (eye, t))
        torch.testing.assert_close(error, torch.tensor(want).double(), rtol=0, atol=1e-6)
    assert evaluate.pose_errors((eye, torch.zeros(3).double()), (eye, t)) == 90


def test_auc_is_the_mean_share_below_each_degree():
    errors = torch.tensor([[0.5, 1.5, 4.0, 50.0]])
    # below 1: 1/4; below 2, 3 and 4: 2/4; below 5: 3/4
    assert evaluate.auc(errors, 5).item() == 100 * (1 + 2 + 2 + 2 + 3) / 4 / 5


def test_one_scale_for_a_scene_is_forgiven_and_two_are_not():
    depth = torch.rand(3, 2, 8, 8) + 1
    assert evaluate.abs_rel(depth * 7, depth).max() < 1e-6
    two = depth.clone()
    two[:, 1] *= 2
    assert evaluate.abs_rel(two, depth).min() > 0.2


def test_knowing_all_but_the_azimuth_scores_below_the_controls_gate():
    """What the scenes must guarantee: no cue of one picture makes a pose. This oracle has all other cues exactly."""
    true = drawn(600).extrinsics
    where = -(true[..., :3].transpose(-1, -2) @ true[..., 3:])[..., 0]
    azimuth = torch.rad2deg(torch.atan2(where[..., 1], where[..., 0]))
    aligned = true.double()
    aligned[..., :3] = aligned[..., :3] @ turned_about_z(azimuth - azimuth[:, :1])
    want = evaluate.relative_poses(true)
    errors = evaluate.pose_errors(evaluate.relative_poses(aligned), want)
    assert evaluate.auc(errors, 30).mean() < 20
    assert evaluate.auc(evaluate.pose_errors(evaluate.best_constant_pose(candidates=200), want), 30).mean() < 10


def test_a_constant_depth_is_far_off():
    depth = render.render(drawn(24, 3), 28, evaluate.textures.load(), samples=1).depth
    assert evaluate.abs_rel(torch.ones_like(depth), depth).mean() >= 0.30


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

    figures = evaluate.evaluate(predict, 4, size, view_counts=(3,))
    assert figures["auc30"] == figures["auc5"] == 100
    assert figures["absrel"] == 0
    assert figures["absrel constant depth"] > 0.2
    assert figures["auc30 another scene"] < 40
    assert figures["auc30 another scene, same cameras"] < 40
