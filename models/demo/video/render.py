"""Clips become pixels: flat textured shapes with soft edges over a photograph or a pattern, in torch on any device."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.demo import photographs
from models.demo.video.captions import ASPECT, COLOURS, Clips

RGB = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.04),
    "yellow": (0.96, 0.90, 0.10),
    "green": (0.10, 0.62, 0.18),
    "cyan": (0.10, 0.82, 0.86),
    "blue": (0.12, 0.24, 0.88),
    "pink": (0.95, 0.30, 0.70),
    "white": (0.96, 0.96, 0.96),
}
PROFILE = 512  # angles at which a shape's outline is tabulated
SOFT = 2.5 / 192  # the width of an object's edge in frame heights
PAN, ZOOM = 0.3, 1.3  # how far a camera goes in a clip: frame heights, and a factor


def render(clips: Clips, frames: int, height: int, width: int, device: str | torch.device = "cpu") -> Tensor:
    """float32 [N, 3, frames, height, width] in [-1, 1]. The first frame is time 0 and the last time 1."""
    clips = clips.to(device)
    n = len(clips)
    time = torch.linspace(0, 1, frames, device=device)
    y, x = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width * ASPECT,
        indexing="ij",
    )
    grid = torch.stack((x, y), -1)  # [H, W, 2] in frame heights
    centre = torch.tensor([ASPECT / 2, 0.5], device=device)
    shift, zoom = _camera(clips.camera, time)
    # [N, T, H, W, 2]: where in the unmoving world each pixel looks
    world = (grid - centre) / zoom[:, :, None, None, None] + centre + shift[:, :, None, None]

    picture = _background(clips, world, height)
    hidden, hiding = (clips.pair == 1).nonzero().flatten(), (clips.pair == 2).nonzero().flatten()
    for rows, which in ((hidden, 1), (torch.arange(n, device=device), 0), (hiding, 1)):
        if len(rows):
            alpha, rgb = _object(clips[rows], which, world[rows], time)
            picture[rows] = torch.lerp(picture[rows], rgb, alpha[..., None])
    return picture.permute(0, 4, 1, 2, 3).mul(2).sub(1).contiguous()


def _camera(camera: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The world's point in the middle of the frame moves by shift [N, T, 2]; things look zoom [N, T] times larger."""
    ways = torch.tensor([(0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (0, 0), (0, 0)], device=time.device)
    shift = ways[camera][:, None] * PAN * (time - 0.5)[None, :, None]
    rate = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0], device=time.device)[camera]
    zoom = ZOOM ** (rate[:, None] * (time - 0.5))
    return shift, zoom


def _background(clips: Clips, world: Tensor, height: int) -> Tensor:
    """[N, T, H, W, 3] in [0, 1]."""
    look = clips.look[:, :, None, None, None]
    aside = (world[..., 0] / ASPECT, world[..., 1])
    first, second = _mood(clips.look[:, 0], 0.75), _mood(clips.look[:, 1], 0.55)  # two colours [N, 3]
    turn = 2 * math.pi * look[:, 2]
    along = (aside[0] - 0.5) * turn.cos() + (aside[1] - 0.5) * turn.sin()
    wave = (2 * math.pi * (1.5 + 2 * look[:, 3]) * along).sin()
    kind = (clips.place - len(photographs.SAMPLES))[:, None, None, None]
    mix = torch.where(kind == 0, 0.08 * along, torch.where(kind == 1, along + 0.5, 0.5 + 0.5 * wave)).clamp(0, 1)
    drawn = torch.lerp(first[:, None, None, None], second[:, None, None, None], mix[..., None])

    photos = _photographs(str(world.device), height)[clips.place.clamp(max=len(photographs.SAMPLES) - 1)]
    size = torch.tensor([photographs.WIDTH / photographs.HEIGHT, 1.0], device=world.device)
    scale = (0.55 + 0.2 * look[:, 3])[..., None]  # the frame's height, of the photograph's
    free = size - scale[:, 0, 0, 0] * torch.tensor([ASPECT, 1.0], device=world.device)
    corner = clips.look[:, 4:6] * free.clamp(min=0)
    at = (corner[:, None, None, None] + scale * world) / size * 2 - 1
    mirrored = (clips.look[:, 6] < 0.5)[:, None, None, None]
    at = torch.stack((torch.where(mirrored, -at[..., 0], at[..., 0]), at[..., 1]), -1)
    n, t, h, w, _ = at.shape
    seen = F.grid_sample(
        photos, at.reshape(n, t * h, w, 2), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    light = (0.75 + 0.5 * look[:, 7])[..., None]
    photo = (seen.reshape(n, 3, t, h, w).permute(0, 2, 3, 4, 1) * light).clamp(0, 1)
    return torch.where((kind < 0)[..., None], photo, drawn)


def _mood(number: Tensor, level: float) -> Tensor:
    """A muted colour [N, 3] for each number in [0, 1]: no background is as saturated as the objects are."""
    turns = number[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3], device=number.device)
    return level * (0.72 + 0.28 * (2 * math.pi * turns).cos()) * (0.6 + 0.4 * (7 * number[:, None] % 1))


@cache
def _photographs(device: str, height: int) -> Tensor:
    """float32 [8, 3, h, w] in [0, 1], shrunk to the clip's own scale so that no sampling aliases."""
    pictures = photographs.load().float() / 255
    shrink = height / 192
    if shrink < 1:
        pictures = F.interpolate(pictures, scale_factor=shrink, mode="area")
    return pictures.to(device)


def _object(clips: Clips, which: int, world: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage [N, T, H, W] and colour [N, T, H, W, 3] of each clip's object 0 (it moves) or 1 (it stands)."""
    centre = clips.start[:, which, None] + (1 - which) * clips.travel[:, None] * time[None, :, None]  # [N, T, 2]
    radius = clips.radius[:, which, None, None, None]
    spin = clips.angle[:, which, None] + clips.turning[:, which, None] * math.pi * time  # [N, T]
    cos, sin = spin.cos()[:, :, None, None], spin.sin()[:, :, None, None]
    away = (world - centre[:, :, None, None]) / radius[..., None]
    u = away[..., 0] * cos + away[..., 1] * sin
    v = away[..., 1] * cos - away[..., 0] * sin

    outline, slope, hole = _outlines(str(world.device))
    shape = clips.shape[:, which, None, None, None]
    far = (u * u + v * v).sqrt()
    place = (torch.atan2(v, u) / (2 * math.pi) + 0.5) * PROFILE
    low = place.floor()
    cell = shape * PROFILE + low.long() % PROFILE
    after = shape * PROFILE + (low.long() + 1) % PROFILE
    edge = torch.lerp(outline.flatten()[cell], outline.flatten()[after], place - low)
    outside = (far - edge) * slope.flatten()[cell]
    outside = torch.maximum(outside, hole[shape] - far)
    alpha = (0.5 - outside * radius / SOFT).clamp(0, 1)

    stripes = (3 * (4.5 * u).sin()).tanh()
    checks = (3 * (4 * u).sin() * (4 * v).sin()).tanh()
    texture = clips.texture[:, which, None, None, None]
    pattern = torch.where(texture == 1, stripes, torch.where(texture == 2, checks, 1.0))
    lit = (0.72 + 0.28 * pattern) * (0.94 - 0.10 * away[..., 0].clamp(-1, 1) - 0.10 * away[..., 1].clamp(-1, 1))
    base = torch.tensor([RGB[c] for c in COLOURS], device=world.device)[clips.colour[:, which]]
    rgb = (base[:, None, None, None] * lit[..., None]).clamp(0, 1)
    return alpha, rgb


@cache
def _outlines(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Each shape as its radius over the angle [8, 512], the cosine between that radius and the outline's normal, and
    the radius of its hole [8]. Areas are those of a circle of radius 0.9, give or take a fifth."""
    angle = (torch.arange(PROFILE) / PROFILE - 0.5) * 2 * math.pi  # -pi at index 0, as atan2 counts; y points down
    cos, sin = angle.cos(), angle.sin()

    def polygon(corners: list[tuple[float, float]]) -> Tensor:
        """The outline of a star-shaped polygon: where each ray from the origin leaves it."""
        found = torch.zeros(PROFILE)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = bx - ax, by - ay
            across = cos * dy - sin * dx
            reach = (ax * dy - ay * dx) / torch.where(across.abs() < 1e-9, 1e-9, across)
            along = (reach * cos - ax) * dx + (reach * sin - ay) * dy
            inside = (along >= -1e-6) & (along <= dx * dx + dy * dy + 1e-6) & (reach > 0)
            found = torch.where(inside & (reach > found), reach, found)
        return found

    def ring_of(radii: list[float], turn: float = -math.pi / 2) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [(r * math.cos(turn + i * step), r * math.sin(turn + i * step)) for i, r in enumerate(radii)]

    arm, tip = 0.34, 1.05
    cross = [(arm, -arm), (tip, -arm), (tip, arm), (arm, arm), (arm, tip), (-arm, tip), (-arm, arm), (-tip, arm),
             (-tip, -arm), (-arm, -arm), (-arm, -tip), (arm, -tip)]  # fmt: skip
    t = torch.linspace(0, 2 * math.pi, 121)[:-1]
    heart_x = 16 * t.sin() ** 3 / 16.5
    heart_y = -(13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()) / 16.5
    outline = torch.stack(
        [
            torch.full((PROFILE,), 0.9),
            polygon(ring_of([1.13] * 4, math.pi / 4)),
            polygon(ring_of([1.25] * 3)),
            polygon(ring_of([1.25, 0.56] * 5)),
            polygon(cross),
            polygon(list(zip(heart_x.tolist(), heart_y.tolist(), strict=True))),
            torch.full((PROFILE,), 1.0),
            0.88 + 0.2 * (5 * (angle + math.pi / 2)).cos(),
        ]
    )
    change = (outline.roll(-1, 1) - outline.roll(1, 1)) / (4 * math.pi / PROFILE)
    slope = 1 / (1 + (change / outline) ** 2).sqrt()
    hole = torch.zeros(8)
    hole[6] = 0.55
    return outline.to(device), slope.to(device), hole.to(device)
