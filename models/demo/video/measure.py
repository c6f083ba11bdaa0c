"""Does a clip show what its caption says? Colour and direction of the moving object read off the pixels, by no network.

The background of a static camera is each pixel's median over time; what differs from it is the object. Its direction is
the slope of its centre over time, its colour the nearest of the eight to its mean RGB vector by angle (so that a darker
stripe or shade does not matter).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.demo.video.captions import COLOURS
from models.demo.video.render import RGB

DIFFERENT = 0.12  # of the full range: below it a pixel counts as background, whatever a decoder's flicker did to it
LEAST_TRAVEL = 0.15  # frame heights in a clip: slower than that is no direction


@dataclass(frozen=True)
class Reading:
    """N clips' readings. -1 stands for "none seen"."""

    colour: Tensor  # int64 [N], an index into COLOURS
    direction: Tensor  # int64 [N], an index into DIRECTIONS


def read(video: Tensor) -> Reading:
    """video float [N, 3, T, H, W] in [-1, 1], static camera, one object that moves."""
    video = video.float().add(1).div(2).clamp(0, 1)
    t, h, w = video.shape[2:]
    back = video.median(dim=2, keepdim=True).values
    different = (video - back).abs().amax(1)  # [N, T, H, W]
    weight = (different - DIFFERENT).clamp(min=0)
    mass = weight.sum((2, 3))
    y = torch.arange(h, device=video.device) / h
    x = torch.arange(w, device=video.device) / h
    centre = (
        torch.stack(((weight.sum(2) * x).sum(-1), (weight.sum(3) * y).sum(-1)), -1) / mass.clamp(min=1e-9)[..., None]
    )

    # Least squares over the frames, each weighted by how much of the object it shows.
    time = torch.linspace(0, 1, t, device=video.device)
    share = mass / mass.sum(1, keepdim=True).clamp(min=1e-9)
    late = time - (share * time).sum(1, keepdim=True)
    aside = centre - (share[..., None] * centre).sum(1, keepdim=True)
    slope = (share * late)[..., None].mul(aside).sum(1) / (share * late**2).sum(1).clamp(min=1e-9)[:, None]
    turn = torch.atan2(slope[:, 1], slope[:, 0]) / (torch.pi / 4)
    direction = turn.round().long() % 8
    seen = (mass.sum(1) > 0) & (slope.norm(dim=1) >= LEAST_TRAVEL)

    inner = weight * (weight > 0.5 * weight.amax((1, 2, 3), keepdim=True))  # its middle, not its soft edge
    rgb = (video * inner[:, None]).sum((2, 3, 4)) / inner.sum((1, 2, 3)).clamp(min=1e-9)[:, None]
    palette = torch.tensor([RGB[c] for c in COLOURS], device=video.device)
    likeness = torch.nn.functional.normalize(rgb, dim=1) @ torch.nn.functional.normalize(palette, dim=1).T
    colour = likeness.argmax(1)
    return Reading(torch.where(seen, colour, -1), torch.where(seen, direction, -1))


def gradient_energy(video: Tensor) -> tuple[float, float]:
    """(spatial, temporal): mean squared difference of neighbouring pixels, and of one pixel in neighbouring frames."""
    video = video.float()
    spatial = (video.diff(dim=-1) ** 2).mean() + (video.diff(dim=-2) ** 2).mean()
    return float(spatial), float((video.diff(dim=2) ** 2).mean())
