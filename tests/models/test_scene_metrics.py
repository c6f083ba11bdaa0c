import torch

from models.cameras import relative_to_first, rotation_from_quaternion
from models.demo.scene import scenes
from models.scene_metrics import abs_rel, auc, pose_errors, relative_poses


def turned_about_z(degrees):
    half = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64)) / 2
    zero = torch.zeros_like(half)
    return rotation_from_quaternion(torch.stack((zero, zero, half.sin(), half.cos()), dim=-1))


def test_the_truth_has_no_error_in_any_frame_and_scale():
    true = scenes.draw(scenes.generator("held-out", 9, 0), 200, 4).extrinsics
    moved = relative_to_first(true.double())
    moved[..., 3] *= 3.7
    errors = pose_errors(relative_poses(moved), relative_poses(true))
    assert errors.max() < 1e-2  # float32 cameras
    assert auc(errors, 30).min() == 100


def test_the_error_of_a_rotation_is_its_angle():
    t = torch.tensor([1.0, 0, 0]).double()
    for degrees in (0.001, 1.0, 29.5, 90.0, 179.0):
        error = pose_errors((turned_about_z(degrees), t), (turned_about_z(0.0), t))
        torch.testing.assert_close(error, torch.tensor(degrees).double(), rtol=1e-6, atol=0)


def test_the_error_of_a_translation_is_the_angle_between_lines():
    eye = torch.eye(3).double()
    for degrees, want in ((20.0, 20.0), (90.0, 90.0), (160.0, 20.0), (180.0, 0.0)):
        t = torch.tensor([1.0, 0, 0]).double()
        error = pose_errors((eye, turned_about_z(degrees) @ t * 5), (eye, t))
        torch.testing.assert_close(error, torch.tensor(want).double(), rtol=0, atol=1e-6)
    assert pose_errors((eye, torch.zeros(3).double()), (eye, t)) == 90


def test_auc_is_the_mean_share_below_each_degree():
    errors = torch.tensor([[0.5, 1.5, 4.0, 50.0]])
    # below 1: 1/4; below 2, 3 and 4: 2/4; below 5: 3/4
    assert auc(errors, 5).item() == 100 * (1 + 2 + 2 + 2 + 3) / 4 / 5


def test_one_scale_for_a_scene_is_forgiven_and_two_are_not():
    depth = torch.rand(3, 2, 8, 8) + 1
    assert abs_rel(depth * 7, depth).max() < 1e-6
    two = depth.clone()
    two[:, 1] *= 2
    assert abs_rel(two, depth).min() > 0.2
