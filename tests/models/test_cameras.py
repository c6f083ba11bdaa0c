import math

import torch

from models import cameras

FLOAT64 = 1e-12  # rounding of a few dozen float64 operations


def random_cameras(count, dtype=torch.float64):
    rotation = cameras.rotation_from_quaternion(torch.randn(count, 4, dtype=dtype))
    extrinsics = torch.cat((rotation, torch.randn(count, 3, 1, dtype=dtype)), dim=-1)
    fov = torch.rand(2, count, dtype=dtype) * 1.5 + 0.3
    return extrinsics, fov


def test_a_quaternion_of_any_length_gives_a_rotation():
    rotation = cameras.rotation_from_quaternion(torch.randn(50, 4, dtype=torch.float64) * 7)
    identity = torch.eye(3, dtype=torch.float64).expand(50, 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(-1, -2), identity, atol=FLOAT64, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50, dtype=torch.float64), atol=FLOAT64, rtol=0)


def test_a_quarter_turn_about_z_is_scalar_last():
    quaternion = torch.tensor([0, 0, math.sin(math.pi / 4), math.cos(math.pi / 4)], dtype=torch.float64)
    want = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(cameras.rotation_from_quaternion(quaternion), want, atol=FLOAT64, rtol=0)


def test_quaternions_survive_the_way_through_a_rotation_up_to_length_and_sign():
    half_turns = torch.eye(4, dtype=torch.float64)[:3]  # w = 0, where the usual formula divides by nothing
    quaternion = torch.cat((torch.randn(200, 4, dtype=torch.float64), half_turns))
    back = cameras.quaternion_from_rotation(cameras.rotation_from_quaternion(quaternion))
    want = torch.nn.functional.normalize(quaternion, dim=-1)
    want = torch.where(want[:, 3:] < 0, -want, want)
    agreement = (back * want).sum(-1).abs()
    torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=FLOAT64, rtol=0)
    assert (back[:, 3] >= 0).all()


def test_a_pose_survives_encoding_and_decoding():
    extrinsics, (fov_h, fov_w) = random_cameras(40)
    intrinsics = cameras.intrinsics_from_fov(fov_h, fov_w, (294, 518))
    encoding = cameras.encode_pose(extrinsics, intrinsics, (294, 518))
    torch.testing.assert_close(encoding[:, 7:], torch.stack((fov_h, fov_w), dim=-1))  # vertical before horizontal
    back, inner = cameras.decode_pose(encoding, (294, 518))
    torch.testing.assert_close(back, extrinsics, atol=1e-10, rtol=0)
    torch.testing.assert_close(inner, intrinsics)
    assert inner[0, :2, 2].tolist() == [259, 147]


def test_the_length_and_the_sign_of_an_encoded_quaternion_do_not_matter():
    extrinsics, fov = random_cameras(10)
    encoding = cameras.encode_pose(extrinsics, cameras.intrinsics_from_fov(*fov, (28, 28)), (28, 28))
    scaled = encoding.clone()
    scaled[:, 3:7] *= -3.5
    torch.testing.assert_close(cameras.decode_pose(scaled, (28, 28))[0], extrinsics, atol=1e-10, rtol=0)


def test_unprojected_points_project_back_onto_their_pixels():
    extrinsics, fov = random_cameras(3)
    intrinsics = cameras.intrinsics_from_fov(*fov, (6, 9))
    depth = torch.rand(3, 6, 9, dtype=torch.float64) + 0.5
    points = cameras.unproject(depth, extrinsics, intrinsics)
    seen = torch.einsum("bij,bhwj->bhwi", extrinsics[..., :3], points) + extrinsics[:, None, None, :, 3]
    torch.testing.assert_close(seen[..., 2], depth)
    pixels = torch.einsum("bij,bhwj->bhwi", intrinsics, seen) / seen[..., 2:]
    v, u = torch.meshgrid(torch.arange(6.0).double(), torch.arange(9.0).double(), indexing="ij")
    torch.testing.assert_close(pixels[..., 0], u.expand(3, -1, -1), atol=1e-9, rtol=0)
    torch.testing.assert_close(pixels[..., 1], v.expand(3, -1, -1), atol=1e-9, rtol=0)


def test_relative_to_the_first_view_the_first_is_the_identity_and_points_keep_their_cameras():
    extrinsics, _ = random_cameras(4)
    moved = cameras.relative_to_first(extrinsics)
    torch.testing.assert_close(moved[0], torch.eye(4, dtype=torch.float64)[:3], atol=FLOAT64, rtol=0)
    point = torch.randn(3, dtype=torch.float64)
    in_first = extrinsics[0, :, :3] @ point + extrinsics[0, :, 3]
    torch.testing.assert_close(
        moved[:, :, :3] @ in_first + moved[:, :, 3], extrinsics[..., :3] @ point + extrinsics[..., 3]
    )
