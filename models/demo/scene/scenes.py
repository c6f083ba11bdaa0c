"""What the demo VGGT sees: rooms with a coloured ground, boxes and ellipsoids, and the cameras that look at them.

A scene is drawn on the CPU from a generator of its own, so that (split, seed, batch) names the same scenes on every
machine; it is a few hundred numbers, and `render.py` turns it into pictures wherever they are wanted. Units are the
scene's own: the objects stand within about one unit of the origin, z is up.

Cameras: azimuth of view 0 anywhere, of each later view uniform within ±`spread` of it; elevation uniform 5° to 60°;
distance to the scene's centre uniform in log over a factor of two; look-at point, roll and field of view jittered.
Everything that could give away an absolute azimuth (sun, layout, colours, the room's orientation) is drawn anew for
each scene, so that the azimuth between two views can be found only by comparing them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from models.demo.scene.textures import NAMES

Split = Literal["train", "held-out"]
BOXES, ELLIPSOIDS = 6, 4
SHAPES = BOXES + ELLIPSOIDS
GROUND, WALLS, CEILING = SHAPES, SHAPES + 1, SHAPES + 5  # rows of `materials`; four walls: +x, -x, +y, -y
MATERIALS = SHAPES + 6
BLOBS, WAVES = 7, 3
SPREAD = 60.0  # degrees
ELEVATION = (5.0, 60.0)
NEAREST = 1.8  # the camera's distance to the centre: this to twice this
CENTRE_HEIGHT = 0.22
# Saturated and far apart, so that a small network can tell objects apart by colour alone.
PALETTE = (
    (0.86, 0.10, 0.12), (0.98, 0.52, 0.06), (0.98, 0.86, 0.10), (0.22, 0.72, 0.16), (0.05, 0.66, 0.62),
    (0.12, 0.40, 0.90), (0.36, 0.12, 0.74), (0.90, 0.16, 0.68), (0.95, 0.95, 0.95), (0.10, 0.10, 0.12),
    (0.50, 0.28, 0.12), (0.62, 0.84, 0.96),
)  # fmt: skip


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes and their cameras, float32, every field with the batch in front."""

    centre: Tensor  # [B, SHAPES, 3], boxes first
    half: Tensor  # [B, SHAPES, 3] half extents of boxes, semi-axes of ellipsoids; negative: no such shape in this scene
    turn: Tensor  # [B, SHAPES, 2] cosine and sine of the yaw
    materials: Tensor  # [B, MATERIALS, 11] two colours, photograph, its weight, tiles a unit, two stripe frequencies
    blobs: Tensor  # [B, BLOBS, 5] ground patches: centre, colour
    blob_edge: Tensor  # [B, 1] how sharp the border between two patches is
    waves: Tensor  # [B, WAVES, 3] of the height field: wave vector, phase
    amplitude: Tensor  # [B, 1] of the height field, 0 for a plane
    room: Tensor  # [B, 5] half extents of the walls in x and y, height of the ceiling, cosine and sine of the yaw
    sun: Tensor  # [B, 4] unit vector towards the light, share of light that comes from everywhere
    extrinsics: Tensor  # [B, S, 3, 4] camera-from-world, OpenCV axes
    fov: Tensor  # [B, 1] radians, the same both ways; one camera takes all pictures of a scene
    gain: Tensor  # [B, S] exposure of each picture

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on `device`, in one copy; on CUDA the copy does not stop the host."""
        parts = [getattr(self, field.name) for field in fields(self)]
        packed = torch.cat([part.flatten() for part in parts])
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        sizes = [part.numel() for part in parts]
        return Scenes(*(flat.view(part.shape) for flat, part in zip(packed.split(sizes), parts, strict=True)))

    def copy_(self, other: Scenes) -> None:
        """Take over the numbers of `other`, in place: a captured CUDA graph reads from here."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    @property
    def views(self) -> int:
        return self.extrinsics.shape[1]


def generator(split: Split, seed: int, batch: int) -> torch.Generator:
    """The source of one batch. Held-out scenes take odd seeds and training ones even seeds, so none is in both.

    torch's generator reads 32 bits of what it is given: 10 for the seed, 21 for the batch, 1 for the split.
    """
    if not 0 <= seed < 2**10 or not 0 <= batch < 2**21:
        raise ValueError(f"seed is below {2**10} and batch below {2**21}, got {seed} and {batch}")
    return torch.Generator().manual_seed((((seed << 21) + batch) << 1) + (split == "held-out"))


def draw(source: torch.Generator, count: int, views: int, spread: float = SPREAD) -> Scenes:
    """`count` scenes with `views` cameras each; `spread` is the largest azimuth from view 0, in degrees."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=source) * (high - low) + low

    def shuffled(rows: int) -> Tensor:
        return torch.rand(count, rows, generator=source).argsort(dim=1)

    def colours(rows: int) -> Tensor:
        """[B, rows, 3]: the palette in a random order, each colour a little off."""
        palette = torch.tensor(PALETTE)
        order = torch.cat([shuffled(len(PALETTE)) for _ in range(math.ceil(rows / len(PALETTE)))], dim=1)[:, :rows]
        return (palette[order] + uniform(-0.07, 0.07, rows, 3)).clamp(0, 1)

    # Objects stand on the cells of a jittered grid, so they do not run into each other. It has no corners: no object
    # reaches as far as the nearest camera.
    steps = (-0.975, -0.325, 0.325, 0.975)
    cells = torch.tensor([(x, y) for x in steps for y in steps if abs(x) + abs(y) < 1.5])
    place = cells[shuffled(len(cells))[:, :SHAPES]] + uniform(-0.12, 0.12, SHAPES, 2)
    half = torch.cat((uniform(0.10, 0.26, SHAPES, 2), uniform(0.10, 0.30, SHAPES, 1)), dim=2)
    tall = uniform(0, 1, BOXES) < 0.4
    half[:, :BOXES, 2] = torch.where(tall, uniform(0.35, 0.62, BOXES), half[:, :BOXES, 2])
    round_ones = uniform(0, 1, ELLIPSOIDS, 1) < 0.5
    half[:, BOXES:] = torch.where(round_ones, uniform(0.14, 0.30, ELLIPSOIDS, 1), half[:, BOXES:])
    height = half[..., 2] * uniform(0.75, 1.0, SHAPES)  # the ground's waves must not show a box's underside
    missing = uniform(0, 1, SHAPES) < 0.3
    missing[:, 0] = False
    half = torch.where(missing[..., None], -1.0, half)
    yaw = uniform(0, 2 * math.pi, SHAPES)

    materials = torch.zeros(count, MATERIALS, 11)
    materials[..., 0:3] = torch.cat((colours(SHAPES), colours(MATERIALS - SHAPES)), dim=1)
    materials[..., 3:6] = colours(MATERIALS)
    materials[..., 6] = torch.randint(len(NAMES), (count, MATERIALS), generator=source).float()
    photographed = uniform(0, 1, MATERIALS) < 0.25
    materials[..., 7] = torch.where(photographed, 0.85, uniform(0.15, 0.45, MATERIALS))
    materials[..., 8] = uniform(0.8, 2.0, MATERIALS)
    striped = uniform(0, 1, MATERIALS, 2) < 0.3
    materials[..., 9:11] = torch.where(striped, uniform(1.2, 3.0, MATERIALS, 2), 0.0)
    materials[:, GROUND, 7] = uniform(0.15, 0.6)
    materials[:, GROUND, 8] = uniform(0.35, 0.8)
    materials[:, WALLS:, 7] = uniform(0.2, 0.7, 5)
    materials[:, WALLS:, 8] = uniform(0.12, 0.25, 5)
    materials[:, WALLS:, 9:11] *= 0.15

    angle = uniform(0, 2 * math.pi, WAVES)
    number = uniform(2.0, 4.5, WAVES)
    waves = torch.stack((number * angle.cos(), number * angle.sin(), uniform(0, 2 * math.pi, WAVES)), dim=-1)
    amplitude = torch.where(uniform(0, 1, 1) < 0.4, 0.0, uniform(0.03, 0.13, 1))
    blobs = torch.cat((uniform(-2.0, 2.0, BLOBS, 2), colours(BLOBS)), dim=-1)

    room_yaw = uniform(0, 2 * math.pi, 1)
    far = 2 * NEAREST
    room = torch.cat(
        (uniform(far + 0.4, far + 2.6, 2), uniform(far, far + 1.5, 1), room_yaw.cos(), room_yaw.sin()), dim=1
    )
    sun_azimuth, sun_height = uniform(0, 2 * math.pi, 1), uniform(0.45, 0.9, 1)
    sun_flat = (1 - sun_height**2).sqrt()
    sun = torch.cat(
        (sun_flat * sun_azimuth.cos(), sun_flat * sun_azimuth.sin(), sun_height, uniform(0.45, 0.65, 1)), dim=1
    )

    azimuth = uniform(0, 2 * math.pi, 1) + torch.cat(
        (torch.zeros(count, 1), torch.deg2rad(uniform(-spread, spread, views - 1))), dim=1
    )
    elevation = torch.deg2rad(uniform(*ELEVATION, views))
    distance = NEAREST * 2 ** uniform(0, 1, views)
    flat = distance * elevation.cos()
    position = torch.stack(
        (flat * azimuth.cos(), flat * azimuth.sin(), CENTRE_HEIGHT + distance * elevation.sin()), dim=-1
    )
    target = torch.cat((uniform(-0.3, 0.3, views, 2), CENTRE_HEIGHT + uniform(-0.2, 0.2, views, 1)), dim=-1)
    return Scenes(
        centre=torch.cat((place, height[..., None]), dim=-1),
        half=half,
        turn=torch.stack((yaw.cos(), yaw.sin()), dim=-1),
        materials=materials,
        blobs=blobs,
        blob_edge=uniform(4.0, 14.0, 1),
        waves=waves,
        amplitude=amplitude,
        room=room,
        sun=sun,
        extrinsics=look_at(position, target, torch.deg2rad(uniform(-12, 12, views))),
        fov=torch.deg2rad(uniform(46, 62, 1)),
        gain=uniform(0.85, 1.15, views),
    )


def look_at(position: Tensor, target: Tensor, roll: Tensor) -> Tensor:
    """Camera-from-world [..., 3, 4] of cameras at `position` looking at `target` [..., 3], rolled by radians [...]."""
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    cosine, sine = roll.cos()[..., None], roll.sin()[..., None]
    rotation = torch.stack((cosine * right + sine * down, cosine * down - sine * right, forward), dim=-2)
    return torch.cat((rotation, -rotation @ position[..., None]), dim=-1)
