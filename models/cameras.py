"""Cameras as VGGT writes them (arXiv:2503.11651): poses, quaternions, fields of view, and points seen through them.

Extrinsics are camera-from-world, [..., 3, 4] = [R | t], OpenCV axes: x right, y down, z forward. Pixel centres are the
integers 0..W-1 and the principal point is (W/2, H/2). Depth is z-depth, not the length of the ray.
A pose encoding is [..., 9]: t (3), quaternion (x, y, z, w), vertical then horizontal field of view in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_from_quaternion(quaternion: Tensor) -> Tensor:
    """[..., 4] as (x, y, z, w), of any length but zero, to [..., 3, 3]. Dividing by |q|² stands in for normalising."""
    x, y, z, w = quaternion.unbind(-1)
    two = 2.0 / (quaternion * quaternion).sum(-1)
    rows = (
        1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w),
        two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w),
        two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """[..., 3, 3] to the unit quaternion (x, y, z, w) with w >= 0, [..., 4]. Differentiable almost everywhere.

    Four formulas, each dividing by another component; the one whose divisor is largest loses no digits.
    """
    m = rotation
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares = torch.stack(
        (1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz), dim=-1
    )  # 4x² .. 4w²
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    products = torch.stack(
        (
            torch.stack((squares[..., 0], xy, xz, xw), dim=-1),
            torch.stack((xy, squares[..., 1], yz, yw), dim=-1),
            torch.stack((xz, yz, squares[..., 2], zw), dim=-1),
            torch.stack((xw, yw, zw, squares[..., 3]), dim=-1),
        ),
        dim=-2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = torch.nn.functional.normalize(products.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """Extrinsics [..., 3, 4] and intrinsics [..., 3, 3] for images of (height, width) to pose encodings [..., 9]."""
    height, width = size
    fov_h = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = quaternion_from_rotation(extrinsics[..., :3])
    return torch.cat((extrinsics[..., 3], quaternion, fov_h[..., None], fov_w[..., None]), dim=-1)


def decode_pose(encoding: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pose encodings [..., 9] for images of (height, width) to extrinsics [..., 3, 4] and intrinsics [..., 3, 3]."""
    rotation = rotation_from_quaternion(encoding[..., 3:7])
    extrinsics = torch.cat((rotation, encoding[..., :3, None]), dim=-1)
    return extrinsics, intrinsics_from_fov(encoding[..., 7], encoding[..., 8], size)


def intrinsics_from_fov(fov_h: Tensor, fov_w: Tensor, size: tuple[int, int]) -> Tensor:
    """Vertical and horizontal fields of view in radians to intrinsics [..., 3, 3]; principal point in the middle."""
    height, width = size
    intrinsics = fov_h.new_zeros(*fov_h.shape, 3, 3)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(fov_w / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(fov_h / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1.0
    return intrinsics


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth [..., H, W] to points in the world, [..., H, W, 3]: X = Rᵀ(X_camera - t)."""
    height, width = depth.shape[-2:]
    u = torch.arange(width, dtype=depth.dtype, device=depth.device)
    v = torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None]
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera = torch.stack(((u - cx) / fx * depth, (v - cy) / fy * depth, depth), dim=-1)
    moved = camera - extrinsics[..., None, None, :, 3]
    x, y, z = (moved[..., j, None] * extrinsics[..., None, None, j, :3] for j in range(3))  # not `@`: see small_product
    return x + y + z


def relative_to_first(extrinsics: Tensor) -> Tensor:
    """Extrinsics [..., S, 3, 4] re-expressed in the camera of view 0, which becomes [I | 0]."""
    first_r, first_t = extrinsics[..., :1, :, :3], extrinsics[..., :1, :, 3:]
    rotation = small_product(extrinsics[..., :3], first_r.transpose(-1, -2))
    return torch.cat((rotation, extrinsics[..., 3:] - small_product(rotation, first_t)), dim=-1)


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in full precision: on a GPU that is allowed TF32, `@` keeps ten bits of a pose."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
