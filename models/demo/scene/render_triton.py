"""render.trace as one Triton kernel: a program for each block of pixels of each picture.

Needs Triton, which render.py does not. The functions go by the names of those in render.py, where they are explained.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.demo.scene import render
from models.demo.scene.scenes import BLOBS, BOXES, CEILING, GROUND, MATERIALS, SHAPES, WALLS, WAVES, Scenes
from models.demo.scene.textures import LEVELS, TILE

FAR = tl.constexpr(render.FAR)
MARCH = tl.constexpr(render.MARCH)
BISECT = tl.constexpr(render.BISECT)
N_SHAPES = tl.constexpr(SHAPES)
N_BOXES = tl.constexpr(BOXES)
N_BLOBS = tl.constexpr(BLOBS)
N_WAVES = tl.constexpr(WAVES)
N_MATERIALS = tl.constexpr(MATERIALS)
ON_GROUND = tl.constexpr(GROUND)
ON_WALLS = tl.constexpr(WALLS)
ON_CEILING = tl.constexpr(CEILING)
TEXELS = tl.constexpr(TILE)
TOP_LEVEL = tl.constexpr(LEVELS - 1)
TILE_LENGTH = tl.constexpr(sum((TILE >> level) ** 2 for level in range(LEVELS)))
TWO_PI = tl.constexpr(2 * math.pi)


def trace(scenes: Scenes, size: int, pyramid: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Images [B, S, 3, size, size] and depth [B, S, size, size], as render.trace gives them up to float32 rounding."""
    count, views = scenes.extrinsics.shape[:2]
    images = torch.empty(count, views, 3, size, size, device=pyramid.device)
    depth = torch.empty(count, views, size, size, device=pyramid.device)
    block = 128
    grid = (triton.cdiv(size * size, block), count * views)
    _trace[grid](
        scenes.centre.contiguous(),
        scenes.half.contiguous(),
        scenes.turn.contiguous(),
        scenes.materials.contiguous(),
        scenes.blobs.contiguous(),
        scenes.blob_edge.contiguous(),
        scenes.waves.contiguous(),
        scenes.amplitude.contiguous(),
        scenes.room.contiguous(),
        scenes.sun.contiguous(),
        scenes.extrinsics.contiguous(),
        scenes.fov.contiguous(),
        scenes.gain.contiguous(),
        pyramid.contiguous(),
        images,
        depth,
        size,
        views,
        samples,
        BLOCK=block,
        num_warps=4,
    )
    return images, depth


@triton.jit
def _nonzero(value):
    return tl.where(tl.abs(value) < 1e-8, tl.where(value > 0, 1e-8, -1e-8), value)


@triton.jit
def _height(x, y, waves, amplitude):
    total = x * 0.0
    for i in tl.static_range(N_WAVES):
        kx, ky, phase = tl.load(waves + 3 * i), tl.load(waves + 3 * i + 1), tl.load(waves + 3 * i + 2)
        total += tl.sin(kx * x + ky * y + phase)
    return total * (amplitude / N_WAVES)


@triton.jit
def _ground_distance(ox, oy, oz, dx, dy, dz, waves, amplitude):
    descends = dz < -1e-6
    descent = tl.where(descends, -dz, 1e-6)
    low, high = (oz - amplitude) / descent, (oz + amplitude) / descent
    step = (high - low) / MARCH
    still_above = dz == dz
    start = low
    for index in range(1, MARCH):
        t = low + step * index
        still_above = still_above & (oz + t * dz > _height(ox + t * dx, oy + t * dy, waves, amplitude))
        start = tl.where(still_above, t, start)
    low = start
    high = start + step
    for _ in range(BISECT):
        t = (low + high) / 2
        over = oz + t * dz > _height(ox + t * dx, oy + t * dy, waves, amplitude)
        low, high = tl.where(over, t, low), tl.where(over, high, t)
    over = oz + low * dz - _height(ox + low * dx, oy + low * dy, waves, amplitude)
    under = oz + high * dz - _height(ox + high * dx, oy + high * dy, waves, amplitude)
    share = tl.minimum(tl.maximum(over / tl.maximum(over - under, 1e-9), 0.0), 1.0)
    return tl.where(descends, low + (high - low) * share, FAR)


@triton.jit
def _slab(o, d, entry, exit_):
    inverse = 1 / _nonzero(d)
    one, other = (-1 - o) * inverse, (1 - o) * inverse
    return tl.maximum(entry, tl.minimum(one, other)), tl.minimum(exit_, tl.maximum(one, other))


@triton.jit
def _stripe(place, frequency, footprint):
    width = tl.maximum(frequency * footprint * TWO_PI, 0.02)
    wave = tl.minimum(tl.maximum(tl.sin(frequency * place * TWO_PI) / width, -1.0), 1.0)
    return tl.where(frequency == 0, 1.0, wave)


@triton.jit
def _texel(place, side):
    halved = place * 0.5
    mirrored = 1 - tl.abs(1 - (halved - tl.floor(halved)) * 2)
    texel = mirrored * side - 0.5
    low = tl.floor(texel)
    return tl.maximum(low, 0.0), tl.minimum(low + 1, side - 1), texel - low


@triton.jit
def _blend(corner, left, right, top, bottom, across, downwards, side):
    """Bilinear among the four texels around a place; `corner` points at the level's first texel."""
    above, below = top * side, bottom * side
    upper_left = tl.load(corner + (above + left).to(tl.int32) * 3)
    upper_right = tl.load(corner + (above + right).to(tl.int32) * 3)
    lower_left = tl.load(corner + (below + left).to(tl.int32) * 3)
    lower_right = tl.load(corner + (below + right).to(tl.int32) * 3)
    upper = upper_left + across * (upper_right - upper_left)
    lower = lower_left + across * (lower_right - lower_left)
    return upper + downwards * (lower - upper)


@triton.jit
def _lit(own, other, stripes, ground, on_ground, photo, weight, light):
    base = own * stripes + other * (1 - stripes)
    base = tl.where(on_ground, ground, base)
    mixed = base * (1 + weight * 1.2 * (photo - 0.5))
    blend = tl.maximum(weight - 0.35, 0.0) * 1.6
    return tl.minimum(tl.maximum((mixed * (1 - blend) + photo * blend) * light, 0.0), 1.0)


@triton.jit
def _trace(
    centre, half, turn, materials, blobs, blob_edge, waves, amplitude, room, sun, extrinsics, fov, gain,
    pyramid, images, depth, size, views, samples, BLOCK: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1)
    scene = picture // views
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size * size
    column, row = (place % size).to(tl.float32) - size / 2, (place // size).to(tl.float32) - size / 2

    centre += scene * N_SHAPES * 3
    half += scene * N_SHAPES * 3
    turn += scene * N_SHAPES * 2
    materials += scene * N_MATERIALS * 11
    blobs += scene * N_BLOBS * 5
    waves += scene * N_WAVES * 3
    room += scene * 5
    sun += scene * 4
    extrinsics += picture * 12
    edge, swell = tl.load(blob_edge + scene), tl.load(amplitude + scene)
    exposure = tl.load(gain + picture)
    room_x, room_y, ceiling = tl.load(room), tl.load(room + 1), tl.load(room + 2)
    room_cosine, room_sine = tl.load(room + 3), tl.load(room + 4)
    sun_x, sun_y, sun_z, ambient = tl.load(sun), tl.load(sun + 1), tl.load(sun + 2), tl.load(sun + 3)
    angle = tl.load(fov + scene) / 2
    slope = 2 * (tl.sin(angle) / tl.cos(angle)) / size

    r00, r01, r02, t0 = tl.load(extrinsics), tl.load(extrinsics + 1), tl.load(extrinsics + 2), tl.load(extrinsics + 3)
    r10, r11, r12, t1 = (
        tl.load(extrinsics + 4),
        tl.load(extrinsics + 5),
        tl.load(extrinsics + 6),
        tl.load(extrinsics + 7),
    )
    r20, r21, r22, t2 = (
        tl.load(extrinsics + 8),
        tl.load(extrinsics + 9),
        tl.load(extrinsics + 10),
        tl.load(extrinsics + 11),
    )
    ox = -(r00 * t0 + r10 * t1 + r20 * t2)
    oy = -(r01 * t0 + r11 * t1 + r21 * t2)
    oz = -(r02 * t0 + r12 * t1 + r22 * t2)
    room_ox, room_oy = ox * room_cosine + oy * room_sine, oy * room_cosine - ox * room_sine

    red_sum, green_sum, blue_sum = column * 0.0, column * 0.0, column * 0.0
    for sample in range(samples):
        x_offset = tl.where(sample == 0, 0.0, tl.where(sample > 2, 0.3, -0.3))
        y_offset = tl.where(sample == 0, 0.0, tl.where(sample % 2 == 0, 0.3, -0.3))
        x, y = (column + x_offset) * slope, (row + y_offset) * slope
        dx, dy, dz = r00 * x + r10 * y + r20, r01 * x + r11 * y + r21, r02 * x + r12 * y + r22

        # Ground, walls and ceiling.
        best = _ground_distance(ox, oy, oz, dx, dy, dz, waves, swell)
        room_dx, room_dy = dx * room_cosine + dy * room_sine, dy * room_cosine - dx * room_sine
        tx = (tl.where(room_dx > 0, room_x, -room_x) - room_ox) / _nonzero(room_dx)
        ty = (tl.where(room_dy > 0, room_y, -room_y) - room_oy) / _nonzero(room_dy)
        tz = tl.where(dz > 1e-8, (ceiling - oz) / _nonzero(dz), FAR)
        wall = tl.where(tx < ty, tl.where(room_dx > 0, 0, 1), tl.where(room_dy > 0, 2, 3)) + ON_WALLS
        met = tl.minimum(tx, ty)
        wall = tl.where(tz < met, ON_CEILING, wall)
        met = tl.minimum(met, tz)
        hit = tl.where(met < best, wall, ON_GROUND)
        best = tl.minimum(met, best)

        # Boxes, then ellipsoids.
        for index in range(N_SHAPES):
            hx, hy, hz = tl.load(half + 3 * index), tl.load(half + 3 * index + 1), tl.load(half + 3 * index + 2)
            cosine, sine = tl.load(turn + 2 * index), tl.load(turn + 2 * index + 1)
            mx, my = ox - tl.load(centre + 3 * index), oy - tl.load(centre + 3 * index + 1)
            lox, loy = (mx * cosine + my * sine) / hx, (my * cosine - mx * sine) / hy
            loz = (oz - tl.load(centre + 3 * index + 2)) / hz
            ldx, ldy, ldz = (dx * cosine + dy * sine) / hx, (dy * cosine - dx * sine) / hy, dz / hz
            if index < N_BOXES:
                entry, exit_ = _slab(lox, ldx, ldx * 0.0 - FAR, ldx * 0.0 + FAR)
                entry, exit_ = _slab(loy, ldy, entry, exit_)
                entry, exit_ = _slab(loz, ldz, entry, exit_)
                met = tl.where(entry < exit_, entry, FAR)
            else:
                a = ldx * ldx + ldy * ldy + ldz * ldz
                b = lox * ldx + loy * ldy + loz * ldz
                c = lox * lox + loy * loy + loz * loz - 1
                reach = b * b - a * c
                met = tl.where(reach > 0, (-b - tl.sqrt(tl.maximum(reach, 0.0))) / a, FAR)
            met = tl.where(met > 1e-3, met, FAR)
            met = tl.where(hx > 0, met, FAR)
            hit = tl.where(met < best, index, hit)
            best = tl.minimum(met, best)
        if sample == 0:
            tl.store(depth + picture.to(tl.int64) * size * size + place, best, mask=inside)

        # The surface: which face, where on it, and its normal.
        px, py, pz = ox + best * dx, oy + best * dy, oz + best * dz
        shape = tl.minimum(hit, N_SHAPES - 1)
        hx, hy, hz = tl.load(half + 3 * shape), tl.load(half + 3 * shape + 1), tl.load(half + 3 * shape + 2)
        cosine, sine = tl.load(turn + 2 * shape), tl.load(turn + 2 * shape + 1)
        mx, my = px - tl.load(centre + 3 * shape), py - tl.load(centre + 3 * shape + 1)
        lx, ly = mx * cosine + my * sine, my * cosine - mx * sine
        lz = pz - tl.load(centre + 3 * shape + 2)
        is_box = hit < N_BOXES
        is_shape = hit < ON_GROUND
        is_wall = (hit >= ON_WALLS) & (hit < ON_CEILING)
        fx = lx / tl.where(is_box, hx, hx * hx)
        fy = ly / tl.where(is_box, hy, hy * hy)
        fz = lz / tl.where(is_box, hz, hz * hz)
        ax, ay, az = tl.abs(fx), tl.abs(fy), tl.abs(fz)
        on_x = tl.where(is_wall, hit < ON_WALLS + 2, (ax >= ay) & (ax >= az) & is_shape)
        on_y = tl.where(is_wall, hit >= ON_WALLS + 2, (ay > ax) & (ay >= az) & is_shape)
        rx, ry = px * room_cosine + py * room_sine, py * room_cosine - px * room_sine
        sx = tl.where(is_wall, rx, tl.where(is_shape, lx, px))
        sy = tl.where(is_wall, ry, tl.where(is_shape, ly, py))
        sz = tl.where(is_shape, lz, pz)
        u = tl.where(on_x, sy, sx)
        v = tl.where(on_x | on_y, sz, sy)

        length = tl.maximum(tl.sqrt(fx * fx + fy * fy + fz * fz), 1e-12)
        nx = tl.where(is_box, tl.where(on_x, tl.where(fx > 0, 1.0, -1.0), 0.0), fx / length)
        ny = tl.where(is_box, tl.where(on_y, tl.where(fy > 0, 1.0, -1.0), 0.0), fy / length)
        nz = tl.where(is_box, tl.where(on_x | on_y, 0.0, tl.where(fz > 0, 1.0, -1.0)), fz / length)
        inwards = tl.where((hit == ON_WALLS) | (hit == ON_WALLS + 2), -1.0, 1.0)
        nx = tl.where(is_wall, tl.where(on_x, inwards, 0.0), nx)
        ny = tl.where(is_wall, tl.where(on_y, inwards, 0.0), ny)
        nz = tl.where(is_wall, 0.0, nz)
        cosine, sine = tl.where(is_wall, room_cosine, cosine), tl.where(is_wall, room_sine, sine)
        wx, wy = nx * cosine - ny * sine, nx * sine + ny * cosine
        gx, gy = px * 0.0, px * 0.0
        for i in tl.static_range(N_WAVES):
            kx, ky, phase = tl.load(waves + 3 * i), tl.load(waves + 3 * i + 1), tl.load(waves + 3 * i + 2)
            swing = tl.cos(kx * px + ky * py + phase) * (swell / N_WAVES)
            gx -= swing * kx
            gy -= swing * ky
        norm = 1 / tl.sqrt(gx * gx + gy * gy + 1)
        on_ground, on_ceiling = hit == ON_GROUND, hit == ON_CEILING
        wx = tl.where(on_ground, gx * norm, tl.where(on_ceiling, 0.0, wx))
        wy = tl.where(on_ground, gy * norm, tl.where(on_ceiling, 0.0, wy))
        wz = tl.where(on_ground, norm, tl.where(on_ceiling, -1.0, nz))

        # Its colour.
        along = tl.sqrt(dx * dx + dy * dy + dz * dz)
        facing = tl.abs(wx * dx + wy * dy + wz * dz) / along
        footprint = best * slope / tl.sqrt(tl.maximum(facing, 0.2))
        material = materials + 11 * hit
        stripes = (
            _stripe(u, tl.load(material + 9), footprint) * _stripe(v, tl.load(material + 10), footprint) * 0.5 + 0.5
        )

        nearest = px * 0.0 + FAR
        for i in range(N_BLOBS):
            bx, by = px - tl.load(blobs + 5 * i), py - tl.load(blobs + 5 * i + 1)
            nearest = tl.minimum(nearest, bx * bx + by * by)
        total, red, green, blue = px * 0.0, px * 0.0, px * 0.0, px * 0.0
        for i in range(N_BLOBS):
            bx, by = px - tl.load(blobs + 5 * i), py - tl.load(blobs + 5 * i + 1)
            weight = tl.exp(edge * (nearest - (bx * bx + by * by)))
            total += weight
            red += weight * tl.load(blobs + 5 * i + 2)
            green += weight * tl.load(blobs + 5 * i + 3)
            blue += weight * tl.load(blobs + 5 * i + 4)

        tiles = tl.load(material + 8)
        level = tl.floor(tl.log2(tl.maximum(footprint * tiles * TEXELS, 1e-6)) + 0.5)
        level = tl.minimum(tl.maximum(level, 0.0), TOP_LEVEL)
        side = tl.exp2(-level) * TEXELS
        start = tl.floor((1 - tl.exp2(-2 * level)) * (TEXELS * TEXELS * 4 / 3) + 0.5)
        corner = pyramid + (tl.load(material + 6) * TILE_LENGTH + start).to(tl.int32) * 3
        left, right, across = _texel(u * tiles, side)
        top, bottom, downwards = _texel(v * tiles, side)

        lambert = tl.maximum(wx * sun_x + wy * sun_y + wz * sun_z, 0.0)
        light = (ambient + (1 - ambient) * lambert) * exposure * 1.15
        weight = tl.load(material + 7)
        photo = _blend(corner, left, right, top, bottom, across, downwards, side)
        red_sum += _lit(tl.load(material), tl.load(material + 3), stripes, red / total, on_ground, photo, weight, light)
        photo = _blend(corner + 1, left, right, top, bottom, across, downwards, side)
        green_sum += _lit(
            tl.load(material + 1), tl.load(material + 4), stripes, green / total, on_ground, photo, weight, light
        )
        photo = _blend(corner + 2, left, right, top, bottom, across, downwards, side)
        blue_sum += _lit(
            tl.load(material + 2), tl.load(material + 5), stripes, blue / total, on_ground, photo, weight, light
        )

    out = images + picture.to(tl.int64) * 3 * size * size + place
    tl.store(out, red_sum / samples, mask=inside)
    tl.store(out + size * size, green_sum / samples, mask=inside)
    tl.store(out + 2 * size * size, blue_sum / samples, mask=inside)
