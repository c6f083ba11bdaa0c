"""Pictures, exact depth, poses and intrinsics of `Scenes`, ray-cast in plain torch, on any device.

A pixel's ray has z = 1 in its camera's frame, so the distance along the ray *is* the z-depth. Boxes, ellipsoids, walls
and ceiling are met in closed form; the height field by a march of fixed steps through its slab, a bisection and a
secant step, which find a true point of the surface, and at grazing angles may step over the tip of a wave.

Pixel centres are the integers 0..W-1 and the principal point is W/2, as VGGT has it. This file is the meaning, and what
a CPU runs; render_triton.py is the same in one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.cameras import intrinsics_from_fov, small_product
from models.demo.scene.scenes import BOXES, CEILING, GROUND, SHAPES, WALLS, Scenes
from models.demo.scene.textures import LEVELS, TILE

MARCH, BISECT = 14, 6
FAR = 1e6
Vec = tuple[Tensor, Tensor, Tensor]
Trace = Callable[[Scenes, int, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Views:
    """What a camera that knows everything would bring home, float32."""

    images: Tensor  # [B, S, 3, H, W] in 0..1
    depth: Tensor  # [B, S, H, W], scene units, positive
    extrinsics: Tensor  # [B, S, 3, 4]
    intrinsics: Tensor  # [B, S, 3, 3]


def render(scenes: Scenes, size: int, pyramid: Tensor, samples: int = 5, traced: Trace | None = None) -> Views:
    """Square pictures of `size` pixels; a colour is the mean of `samples` (1 or 5) rays, depth that of the centre ray.

    `pyramid` is `textures.load()` on the scenes' device. `traced` is `trace` or its like; left out, it is the Triton
    kernel of render_triton.py on CUDA, and `trace` elsewhere.
    """
    if samples not in (1, 5):
        raise ValueError(f"samples is 1 or 5, got {samples}")
    if traced is None and scenes.fov.is_cuda:
        from models.demo.scene.render_triton import trace as traced
    images, depth = (traced or trace)(scenes, size, pyramid, samples)
    intrinsics = intrinsics_from_fov(scenes.fov, scenes.fov, (size, size)).expand(-1, scenes.views, -1, -1)
    return Views(images, depth, scenes.extrinsics, intrinsics)


def trace(scenes: Scenes, size: int, pyramid: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Images [B, S, 3, size, size] and depth [B, S, size, size]: the meaning of the kernel, in plain torch."""
    colour, depth = _through(scenes, size, pyramid, 0.0, 0.0)
    for x, y in [(x, y) for x in (-0.3, 0.3) for y in (-0.3, 0.3)] if samples == 5 else []:
        colour = colour + _through(scenes, size, pyramid, x, y)[0]
    return colour / samples, depth


def _through(scenes: Scenes, size: int, pyramid: Tensor, x: float, y: float) -> tuple[Tensor, Tensor]:
    """What comes back along the ray through each pixel centre moved by (x, y) pixels: light, and the distance."""
    origin, direction = _rays(scenes, size, x, y)
    distance, hit = _nearest(scenes, origin, direction)
    point = (
        origin[0] + distance * direction[0],
        origin[1] + distance * direction[1],
        origin[2] + distance * direction[2],
    )
    normal, (u, v) = _surface(scenes, point, hit)

    along = sum(d * d for d in direction).sqrt()
    facing = sum(n * d for n, d in zip(normal, direction, strict=True)).abs() / along
    footprint = distance * (2 * torch.tan(_per_scene(scenes.fov) / 2) / size) / facing.clamp(min=0.2).sqrt()

    material = _pick(scenes.materials, hit)
    ground_colour = _ground_colour(scenes, point[0], point[1])
    stripes = _stripe(u, material[9], footprint) * _stripe(v, material[10], footprint) * 0.5 + 0.5
    photo = _photograph(pyramid, u, v, material[6], material[8], footprint)
    sun = scenes.sun.unbind(-1)
    light = sum(n * _per_scene(s) for n, s in zip(normal, sun[:3], strict=True)).clamp(min=0)
    ambient = _per_scene(sun[3])
    light = (ambient + (1 - ambient) * light) * scenes.gain[..., None, None] * 1.15
    channels = []
    for channel in range(3):
        base = material[channel] * stripes + material[3 + channel] * (1 - stripes)
        base = torch.where(hit == GROUND, ground_colour[channel], base)
        # A photograph both tints and modulates: half of its weight mixes its colours in, half darkens and brightens.
        mixed = base * (1 + material[7] * 1.2 * (photo[channel] - 0.5))
        blend = (material[7] - 0.35).clamp(min=0) * 1.6
        channels.append(((mixed * (1 - blend) + photo[channel] * blend) * light).clamp(0, 1))
    return torch.stack(channels, dim=2), distance


def _per_scene(value: Tensor) -> Tensor:
    """[B] or [B, 1] to [B, 1, 1, 1]."""
    return value.reshape(-1, 1, 1, 1)


def _rays(scenes: Scenes, size: int, x_offset: float, y_offset: float) -> tuple[Vec, Vec]:
    """Origins [B, S, 1, 1] and directions [B, S, H, W], three of each; a direction is 1 long along the optical axis."""
    pixel = torch.arange(size, device=scenes.fov.device, dtype=torch.float32) - size / 2
    slope = 2 * torch.tan(_per_scene(scenes.fov) / 2) / size
    x, y = (pixel + x_offset) * slope, (pixel + y_offset)[:, None] * slope
    rotation = scenes.extrinsics[..., :3]
    position = -small_product(rotation.transpose(-1, -2), scenes.extrinsics[..., 3:])[..., 0]
    r = [[rotation[..., i, j, None, None] for j in range(3)] for i in range(3)]
    direction = [r[0][j] * x + r[1][j] * y + r[2][j] for j in range(3)]
    origin = [position[..., j, None, None] for j in range(3)]
    return (origin[0], origin[1], origin[2]), (direction[0], direction[1], direction[2])


def _nonzero(value: Tensor) -> Tensor:
    """Zero becomes the smallest step in its own direction: a wall that a ray runs along is far ahead, never behind."""
    return torch.where(value.abs() < 1e-8, torch.where(value > 0, 1e-8, -1e-8), value)


def _nearest(scenes: Scenes, origin: Vec, direction: Vec) -> tuple[Tensor, Tensor]:
    """Distance to the nearest surface and its row in `materials`, both [B, S, H, W]. Rooms are closed: there is one."""
    best = _ground_distance(scenes, origin, direction)
    hit = torch.full_like(best, GROUND, dtype=torch.int32)

    half_x, half_y, ceiling, cosine, sine = (_per_scene(part) for part in scenes.room.unbind(-1))
    (ox, oy), (dx, dy) = _turned(origin, cosine, sine), _turned(direction, cosine, sine)
    tx = (torch.where(dx > 0, half_x, -half_x) - ox) / _nonzero(dx)
    ty = (torch.where(dy > 0, half_y, -half_y) - oy) / _nonzero(dy)
    tz = torch.where(direction[2] > 1e-8, (ceiling - origin[2]) / _nonzero(direction[2]), FAR)
    wall = torch.where(tx < ty, WALLS + (dx <= 0).int(), WALLS + 2 + (dy <= 0).int())
    exit_distance = torch.minimum(tx, ty)
    wall = torch.where(tz < exit_distance, CEILING, wall)
    exit_distance = torch.minimum(exit_distance, tz)
    hit = torch.where(exit_distance < best, wall, hit)
    best = torch.minimum(exit_distance, best)

    for index in range(SHAPES):
        centre = [_per_scene(scenes.centre[:, index, axis]) for axis in range(3)]
        half = [_per_scene(scenes.half[:, index, axis]) for axis in range(3)]
        cosine, sine = (_per_scene(scenes.turn[:, index, part]) for part in range(2))
        moved = (origin[0] - centre[0], origin[1] - centre[1], origin[2] - centre[2])
        local_o = [part / h for part, h in zip((*_turned(moved, cosine, sine), moved[2]), half, strict=True)]
        local_d = [part / h for part, h in zip((*_turned(direction, cosine, sine), direction[2]), half, strict=True)]
        met = _box(local_o, local_d) if index < BOXES else _ball(local_o, local_d)
        met = torch.where((half[0] > 0) & (met > 1e-3), met, FAR)
        hit = torch.where(met < best, index, hit)
        best = torch.minimum(met, best)
    return best, hit


def _turned(vector: Vec, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of a vector in the frame of something that stands at that yaw."""
    return vector[0] * cosine + vector[1] * sine, vector[1] * cosine - vector[0] * sine


def _box(origin: list[Tensor], direction: list[Tensor]) -> Tensor:
    """Entry distance into the cube [-1, 1]³, FAR where the ray misses it."""
    entry = exit_ = None
    for o, d in zip(origin, direction, strict=True):
        inverse = 1 / _nonzero(d)
        one, other = (-1 - o) * inverse, (1 - o) * inverse
        near, far = torch.minimum(one, other), torch.maximum(one, other)
        entry = near if entry is None else torch.maximum(entry, near)
        exit_ = far if exit_ is None else torch.minimum(exit_, far)
    return torch.where(entry < exit_, entry, FAR)


def _ball(origin: list[Tensor], direction: list[Tensor]) -> Tensor:
    """Entry distance into the unit ball, FAR where the ray misses it."""
    a = sum(d * d for d in direction)
    b = sum(o * d for o, d in zip(origin, direction, strict=True))
    c = sum(o * o for o in origin) - 1
    inside = b * b - a * c
    return torch.where(inside > 0, (-b - inside.clamp(min=0).sqrt()) / a, FAR)


def _height(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    waves = [[_per_scene(scenes.waves[:, i, j]) for j in range(3)] for i in range(scenes.waves.shape[1])]
    return sum(torch.sin(kx * x + ky * y + phase) for kx, ky, phase in waves) * (
        _per_scene(scenes.amplitude) / len(waves)
    )


def _ground_distance(scenes: Scenes, origin: Vec, direction: Vec) -> Tensor:
    """Distance to the height field, FAR for rays that do not descend. The camera is above its highest point."""
    amplitude = _per_scene(scenes.amplitude)
    descent = torch.where(direction[2] < -1e-6, -direction[2], 1e-6)
    low, high = (origin[2] - amplitude) / descent, (origin[2] + amplitude) / descent

    def above(t: Tensor) -> Tensor:
        x, y, z = (o + t * d for o, d in zip(origin, direction, strict=True))
        return z > _height(scenes, x, y)

    step = (high - low) / MARCH
    still_above = torch.ones_like(low, dtype=torch.bool)
    start = low
    for index in range(1, MARCH):
        still_above = still_above & above(low + step * index)
        start = torch.where(still_above, low + step * index, start)
    low, high = start, start + step
    for _ in range(BISECT):
        middle = (low + high) / 2
        over = above(middle)
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    # A last secant step takes the bisection's 1/64 of a march step down to float32's own rounding.
    (x0, y0, z0), (x1, y1, z1) = (tuple(o + t * d for o, d in zip(origin, direction, strict=True)) for t in (low, high))
    over, under = z0 - _height(scenes, x0, y0), z1 - _height(scenes, x1, y1)
    met = low + (high - low) * (over / (over - under).clamp(min=1e-9)).clamp(0, 1)
    return torch.where(direction[2] < -1e-6, met, FAR)


def _pick(table: Tensor, row: Tensor) -> list[Tensor]:
    """The columns of table [B, rows, K] at `row` [B, S, H, W], as K tensors."""
    count, rows, columns = table.shape
    flat = table.reshape(-1)
    start = (torch.arange(count, device=table.device).view(-1, 1, 1, 1) * rows + row) * columns
    return [flat[start + column] for column in range(columns)]


def _surface(scenes: Scenes, point: tuple[Tensor, ...], hit: Tensor) -> tuple[Vec, tuple[Tensor, Tensor]]:
    """The normal in the world and the place on the surface (u, v), in scene units, of every hit."""
    x, y, z = point
    shape = hit.clamp(max=SHAPES - 1)
    cx, cy, cz, hx, hy, hz, cosine, sine = _pick(torch.cat((scenes.centre, scenes.half, scenes.turn), dim=-1), shape)
    lx, ly = _turned((x - cx, y - cy, z), cosine, sine)
    lz = z - cz
    is_box, is_wall = hit < BOXES, (hit >= WALLS) & (hit < CEILING)
    # What decides the face: on a box the coordinate nearest to its side, on an ellipsoid the largest of the normal.
    fx, fy, fz = (part / torch.where(is_box, h, h * h) for part, h in ((lx, hx), (ly, hy), (lz, hz)))
    ax, ay, az = fx.abs(), fy.abs(), fz.abs()
    on_x, on_y = (ax >= ay) & (ax >= az), (ay > ax) & (ay >= az)

    _, _, _, room_cosine, room_sine = (_per_scene(part) for part in scenes.room.unbind(-1))
    rx, ry = _turned((x, y, z), room_cosine, room_sine)
    wall = hit - WALLS
    on_x = torch.where(is_wall, wall < 2, on_x & (hit < GROUND))
    on_y = torch.where(is_wall, wall >= 2, on_y & (hit < GROUND))
    px, py = torch.where(is_wall, rx, lx), torch.where(is_wall, ry, ly)
    flat = (hit == GROUND) | (hit == CEILING)
    px, py, pz = torch.where(flat, x, px), torch.where(flat, y, py), torch.where(is_wall | flat, z, lz)
    u = torch.where(on_x, py, px)
    v = torch.where(on_x | on_y, pz, py)

    box = tuple(torch.where(on, torch.sign(f), 0.0) for on, f in ((on_x, fx), (on_y, fy), (~on_x & ~on_y, fz)))
    length = (fx * fx + fy * fy + fz * fz).sqrt().clamp(min=1e-12)
    nx, ny, nz = (torch.where(is_box, b, f / length) for b, f in zip(box, (fx, fy, fz), strict=True))
    side = 1.0 - 2.0 * ((wall == 0) | (wall == 2)).float()  # walls look inwards
    nx = torch.where(is_wall, torch.where(on_x, side, 0.0), nx)
    ny = torch.where(is_wall, torch.where(on_y, side, 0.0), ny)
    nz = torch.where(is_wall, 0.0, nz)
    cosine, sine = torch.where(is_wall, room_cosine, cosine), torch.where(is_wall, room_sine, sine)
    wx, wy = nx * cosine - ny * sine, nx * sine + ny * cosine

    waves = [[_per_scene(scenes.waves[:, i, j]) for j in range(3)] for i in range(scenes.waves.shape[1])]
    scale = _per_scene(scenes.amplitude) / len(waves)
    swing = [torch.cos(kx * x + ky * y + phase) * scale for kx, ky, phase in waves]
    gx = -sum(s * kx for s, (kx, _, _) in zip(swing, waves, strict=True))
    gy = -sum(s * ky for s, (_, ky, _) in zip(swing, waves, strict=True))
    norm = (gx * gx + gy * gy + 1).rsqrt()
    is_ground, is_ceiling = hit == GROUND, hit == CEILING
    wx = torch.where(is_ground, gx * norm, torch.where(is_ceiling, 0.0, wx))
    wy = torch.where(is_ground, gy * norm, torch.where(is_ceiling, 0.0, wy))
    wz = torch.where(is_ground, norm, torch.where(is_ceiling, -1.0, nz))
    return (wx, wy, wz), (u, v)


def _ground_colour(scenes: Scenes, x: Tensor, y: Tensor) -> Vec:
    """Patches of colour: a point takes the colour of the nearest centre, with soft borders."""
    blobs = [[_per_scene(scenes.blobs[:, i, j]) for j in range(5)] for i in range(scenes.blobs.shape[1])]
    squares = [(x - bx) ** 2 + (y - by) ** 2 for bx, by, *_ in blobs]
    nearest = squares[0]
    for square in squares[1:]:
        nearest = torch.minimum(nearest, square)
    edge = _per_scene(scenes.blob_edge)
    weights = [torch.exp(edge * (nearest - square)) for square in squares]
    total = sum(weights)
    red, green, blue = (sum(w * blob[2 + c] for w, blob in zip(weights, blobs, strict=True)) / total for c in range(3))
    return red, green, blue


def _stripe(place: Tensor, frequency: Tensor, footprint: Tensor) -> Tensor:
    """A square wave in -1..1 whose edges are as soft as a pixel is wide; 1 where the frequency is 0."""
    width = (2 * math.pi * frequency * footprint).clamp(min=0.02)
    wave = (torch.sin(2 * math.pi * frequency * place) / width).clamp(-1, 1)
    return torch.where(frequency == 0, 1.0, wave)


def _photograph(pyramid: Tensor, u: Tensor, v: Tensor, tile: Tensor, tiles: Tensor, footprint: Tensor) -> list[Tensor]:
    """Colours of a photograph repeated in mirrors, bilinear on the level whose texels are as large as a pixel."""
    level = torch.floor(torch.log2((footprint * tiles * TILE).clamp(min=1e-6)) + 0.5).clamp(0, LEVELS - 1)
    side = TILE * torch.exp2(-level)
    # The levels before this one hold TILE² (1 + 1/4 + ...) texels.
    start = tile * pyramid.shape[1] + torch.floor(TILE * TILE * 4 / 3 * (1 - torch.exp2(-2 * level)) + 0.5)
    corners = []
    for place in (u, v):
        mirrored = 1 - (1 - torch.remainder(place * tiles, 2.0)).abs()
        texel = mirrored * side - 0.5
        low = torch.floor(texel)
        corners.append((low.clamp(min=0), torch.minimum(low + 1, side - 1), texel - low))
    (left, right, across), (top, bottom, downwards) = corners
    flat = pyramid.reshape(-1)

    def texels(row: Tensor, column: Tensor, channel: int) -> Tensor:
        return flat[(start + row * side + column).to(torch.int64) * 3 + channel]

    colours = []
    for channel in range(3):
        upper = torch.lerp(texels(top, left, channel), texels(top, right, channel), across)
        lower = torch.lerp(texels(bottom, left, channel), texels(bottom, right, channel), across)
        colours.append(torch.lerp(upper, lower, downwards))
    return colours
