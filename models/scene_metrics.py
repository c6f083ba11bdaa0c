"""How far reconstructed cameras and depths are from the true ones, whatever frame and scale they are in.

A pair of views' error is the larger of the angle between the relative rotations and the angle between the translations'
directions, signs ignored, as VGGT is evaluated (arXiv:2503.11651); AUC@t is the mean over the thresholds 1..t degrees
of the share of pairs below. AbsRel of depth is taken after one scale for the scene: the median of true over predicted.
All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_poses(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Extrinsics [B, S, 3, 4] to rotations [B, pairs, 3, 3], translations [B, pairs, 3] from view i to j > i."""
    extrinsics = extrinsics.double()
    i, j = torch.triu_indices(extrinsics.shape[1], extrinsics.shape[1], offset=1)
    (r_i, t_i), (r_j, t_j) = ((extrinsics[:, k, :, :3], extrinsics[:, k, :, 3:]) for k in (i, j))
    rotation = r_j @ r_i.transpose(-1, -2)
    return rotation, (t_j - rotation @ t_i)[..., 0]


def pose_errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> Tensor:
    """Degrees, [...]: the larger of rotation error and translation-direction error of relative poses that broadcast."""
    (r, t), (r_want, t_want) = got, want
    # ‖R - R'‖ = 2 √2 sin(angle / 2): exact for small angles, where the arc cosine of a trace is not.
    half_sine = ((r - r_want).flatten(-2).norm(dim=-1) / 8**0.5).clamp(max=1)
    rotation = torch.rad2deg(2 * torch.asin(half_sine))
    t, t_want = torch.broadcast_tensors(t, t_want)
    across = torch.linalg.cross(t, t_want).norm(dim=-1)
    along = (t * t_want).sum(-1).abs()  # signs ignored
    translation = torch.rad2deg(torch.atan2(across, along))
    translation = torch.where(t.norm(dim=-1) > 0, translation, 90.0)  # no direction at all is as wrong as can be
    return torch.maximum(rotation, translation)


def auc(errors: Tensor, threshold: int) -> Tensor:
    """Errors [..., pairs] in degrees to the mean over 1..threshold of the share of pairs below, [...], in 0..100."""
    limits = torch.arange(1, threshold + 1, device=errors.device)
    return (errors[..., None] < limits).double().mean((-1, -2)) * 100


def abs_rel(got: Tensor, want: Tensor) -> Tensor:
    """Depths [B, S, H, W] to the mean relative error of each scene after one scale for it, [B]."""
    got, want = got.flatten(1).double(), want.flatten(1).double()
    scale = (want / got).median(dim=1, keepdim=True).values
    return ((got * scale - want).abs() / want).mean(dim=1)
