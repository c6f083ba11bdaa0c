"""A reconstructed scene becomes files: a GLB and a PLY of coloured points, the cameras, depth maps, and a picture.

The world is the first view's camera: x right, y down, z forward (OpenCV), in a unit that a reconstruction without a
measured length leaves open. `scene.ply`, `cameras.json` and the depth maps are in it. `scene.glb` stands as glTF has
it, y up: levelled by what the cameras agree is up, and seen first from where the first camera stood.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from models.base import OutputFile

Format = Literal["glb", "ply", "cameras", "depth"]
FORMATS: tuple[Format, ...] = ("glb", "ply", "cameras", "depth")


@dataclass(frozen=True)
class View:
    """One picture and what was found out about it. Pixel centres are integers; depth is z-depth, not a ray's length."""

    name: str  # of the picture's file
    width: int  # of the picture
    height: int
    intrinsics: np.ndarray  # [3, 3], in the picture's pixels
    extrinsics: np.ndarray  # [3, 4], camera-from-world
    pixels: np.ndarray  # uint8 [h, w, 3]: what the network saw of the picture
    depth: np.ndarray  # float32 [h, w], positive
    confidence: np.ndarray  # float32 [h, w], higher is surer
    depth_intrinsics: np.ndarray  # [3, 3], in the pixels of `depth`

    @property
    def centre(self) -> np.ndarray:
        """Where the camera stands, [3]."""
        return -self.extrinsics[:, :3].T @ self.extrinsics[:, 3]


@dataclass(frozen=True)
class PointFilter:
    """Which pixels become points."""

    drop: float = 30.0  # percent of all pixels, those the network is least sure of
    edge: float = 0.04  # a pixel goes where a neighbour's depth differs by more than this share: it belongs to neither
    most: int = 1_000_000  # points; where there are more, an even draw of them

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 100 or not self.edge > 0 or self.most < 1:
            raise ValueError(f"drop is 0 to 100 percent, edge above 0 and most at least 1; got {self}")


@dataclass(frozen=True)
class Points:
    """N points, N at least 1."""

    xyz: np.ndarray  # float32 [N, 3], in the world
    rgb: np.ndarray  # uint8 [N, 3], sRGB
    size: np.ndarray  # float32 [N]: how far its neighbours in the picture are, at most four times a pixel's width there


def points_of(views: Sequence[View], keep: PointFilter = PointFilter()) -> Points:
    """The pixels of all views that pass the filter, where they are in the world; at least one.

    Where every sure pixel lies at an edge, edges are let pass.
    """
    limit = np.percentile(np.concatenate([view.confidence.ravel() for view in views]), keep.drop)
    sure = [view.confidence >= limit for view in views]
    kept = [where & ~_at_an_edge(view.depth, keep.edge) for where, view in zip(sure, views, strict=True)]
    if not any(where.any() for where in kept):
        kept = sure
    parts = [_view_points(view, where) for view, where in zip(views, kept, strict=True)]
    xyz, rgb, size = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(xyz) > keep.most:
        chosen = np.sort(np.random.default_rng(0).choice(len(xyz), keep.most, replace=False))
        xyz, rgb, size = xyz[chosen], rgb[chosen], size[chosen]
    return Points(xyz, rgb, size)


def _view_points(view: View, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    height, width = view.depth.shape
    pixels = np.stack((*np.meshgrid(np.arange(width), np.arange(height)), np.ones((height, width))), axis=-1)
    camera = pixels @ np.linalg.inv(view.depth_intrinsics).T * view.depth[..., None]
    xyz = (camera - view.extrinsics[:, 3]) @ view.extrinsics[:, :3]  # Rᵀ(X - t)
    beside = np.linalg.norm(np.diff(xyz, axis=1, append=xyz[:, -2:-1]), axis=-1)
    below = np.linalg.norm(np.diff(xyz, axis=0, append=xyz[-2:-1]), axis=-1)
    facing = view.depth / view.depth_intrinsics[0, 0]
    size = np.minimum(np.maximum(beside, below), 4 * facing)
    return xyz[kept].astype(np.float32), view.pixels[kept], size[kept].astype(np.float32)


def _at_an_edge(depth: np.ndarray, share: float) -> np.ndarray:
    logs = np.pad(np.log(depth), 1, mode="edge")
    middle = logs[1:-1, 1:-1]
    around = (logs[:-2, 1:-1], logs[2:, 1:-1], logs[1:-1, :-2], logs[1:-1, 2:])
    return np.max([np.abs(other - middle) for other in around], axis=0) > math.log1p(share)


def up_of(views: Sequence[View]) -> np.ndarray:
    """The direction, unit [3], that the cameras agree is up.

    People hold cameras level: up is what all their x axes are most nearly square to (our choice; VGGT knows no
    gravity). The mean of their own up decides the sign, and more than that where the x axes leave it open, as they do
    with one view.
    """
    right = np.stack([view.extrinsics[0, :3] for view in views])
    mean = -np.mean([view.extrinsics[1, :3] for view in views], axis=0)
    mean /= np.linalg.norm(mean)
    spread = right.T @ right / len(views) - 0.02 * np.outer(mean, mean)
    up = np.linalg.eigh(spread)[1][:, 0]
    return up if up @ mean > 0 else -up


def upright(views: Sequence[View]) -> np.ndarray:
    """Rotation [3, 3] from the world to glTF's axes: y up, and the first camera looks towards -z."""
    up = up_of(views)
    forward = views[0].extrinsics[2, :3]
    level = forward - (forward @ up) * up
    if np.linalg.norm(level) < 1e-3:  # it looks straight down: the upper edge of its picture is ahead
        level = -views[0].extrinsics[1, :3]
        level -= (level @ up) * up
    back = -level / np.linalg.norm(level)
    return np.stack((np.cross(up, back), up, back))


# GLB


def write_glb(points: Points, views: Sequence[View], path: Path) -> None:
    """glTF 2.0: one node of points, and one node a view with its camera and a frustum as wide as it sees.

    Colours are linear light, as glTF wants vertex colours, in floats: 8 bits would leave steps in the dark, and 16 are
    read wrongly by trimesh. All materials are unlit: the pictures hold the light already.
    """
    rotation = upright(views)
    binary = bytearray()
    document: dict[str, list] = {"bufferViews": [], "accessors": [], "meshes": [], "nodes": [], "cameras": []}

    def add(values: np.ndarray, target: int, **facts: object) -> int:
        binary.extend(b"\0" * (-len(binary) % 4))
        document["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(binary), "byteLength": values.nbytes, "target": target}
        )
        binary.extend(values.tobytes())
        document["accessors"].append(
            {"bufferView": len(document["bufferViews"]) - 1, "count": len(values), "byteOffset": 0} | facts
        )
        return len(document["accessors"]) - 1

    def positions(xyz: np.ndarray) -> int:
        xyz = np.ascontiguousarray(xyz, np.float32)
        return add(xyz, ARRAY, componentType=FLOAT, type="VEC3", min=xyz.min(0).tolist(), max=xyz.max(0).tolist())

    def colours(rgb: np.ndarray) -> int:
        return add(_linear(rgb), ARRAY, componentType=FLOAT, type="VEC3")

    def mesh(name: str, **primitive: object) -> int:
        document["meshes"].append({"name": name, "primitives": [{"material": 0} | primitive]})
        return len(document["meshes"]) - 1

    cloud = {"POSITION": positions(points.xyz @ rotation.T.astype(np.float32)), "COLOR_0": colours(points.rgb)}
    document["nodes"].append({"name": "points", "mesh": mesh("points", attributes=cloud, mode=POINTS)})
    reach = frustum_length(points, views)
    for index, view in enumerate(views):
        corners, triangles = _frustum_mesh(view, reach)
        tint = np.tile(np.array(view_colour(index, len(views)), np.uint8), (len(corners), 1))
        shape = mesh(
            f"view {index}",
            attributes={"POSITION": positions(corners), "COLOR_0": colours(tint)},
            indices=add(triangles.ravel(), ELEMENTS, componentType=UNSIGNED_SHORT, type="SCALAR"),
            mode=TRIANGLES,
        )
        document["cameras"].append(
            {
                "name": view.name,
                "type": "perspective",
                "perspective": {
                    "yfov": 2 * math.atan(view.height / 2 / view.intrinsics[1, 1]),
                    "aspectRatio": view.width * view.intrinsics[1, 1] / (view.height * view.intrinsics[0, 0]),
                    "znear": 0.01 * reach,
                },
            }
        )
        placed = np.eye(4)
        placed[:3, :3] = rotation @ view.extrinsics[:, :3].T @ np.diag((1.0, -1.0, -1.0))
        placed[:3, 3] = rotation @ view.centre
        document["nodes"].append(
            {"name": f"view {index}: {view.name}", "mesh": shape, "camera": index, "matrix": placed.T.ravel().tolist()}
        )

    whole = document | {
        "asset": {"version": "2.0", "generator": "lowbit"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(document["nodes"])))}],
        "materials": [{"name": "as seen", "extensions": {"KHR_materials_unlit": {}}, "doubleSided": True}],
        "extensionsUsed": ["KHR_materials_unlit"],
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary.extend(b"\0" * (-len(binary) % 4))
    length = 12 + 8 + len(text) + 8 + len(binary)
    with path.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, length))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(binary), b"BIN\0") + binary)


ARRAY, ELEMENTS = 34962, 34963
UNSIGNED_SHORT, FLOAT = 5123, 5126
POINTS, TRIANGLES = 0, 4


def _linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 [N, 3] to linear light, float32 [N, 3] in 0..1."""
    level = np.arange(256) / 255
    table = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return table.astype(np.float32)[rgb]


def frustum_length(points: Points, views: Sequence[View]) -> float:
    """How long a camera's frustum is drawn: a share of the diagonal of what there is to see."""
    low, high = np.percentile(points.xyz, (5, 95), axis=0)
    return max(0.035 * float(np.linalg.norm(high - low)), 1e-6)


def frustum_lines(view: View, length: float) -> np.ndarray:
    """The eight edges of a frustum, float64 [8, 2, 3], in the camera's axes (OpenCV)."""
    right, bottom = view.width - 0.5, view.height - 0.5
    edge = np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])
    rays = np.concatenate((edge, np.ones((4, 1))), axis=1) @ np.linalg.inv(view.intrinsics).T
    corners, tip = rays * length, np.zeros(3)
    return np.array([(tip, corner) for corner in corners] + [(corners[i], corners[(i + 1) % 4]) for i in range(4)])


# Triangles of a box whose corner number is 4 * end + 2 * one side + other side, seen from outside.
ROD = np.array(
    [
        [0, 1, 3], [0, 3, 2], [4, 7, 5], [4, 6, 7], [0, 4, 5], [0, 5, 1],
        [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
    ]
)  # fmt: skip


def _frustum_mesh(view: View, length: float) -> tuple[np.ndarray, np.ndarray]:
    """The edges as thin square rods, in glTF's camera axes: corners [64, 3], triangles uint16 [96, 3]."""
    corners: list[np.ndarray] = []
    triangles: list[np.ndarray] = []
    for start, end in frustum_lines(view, length) * (1, -1, -1):
        along = (end - start) / np.linalg.norm(end - start)
        side = np.cross(along, np.eye(3)[np.abs(along).argmin()])
        side /= np.linalg.norm(side)
        other = np.cross(along, side)
        thick = 0.012 * length
        triangles.append(ROD + 8 * len(triangles))
        corners += [point + thick * (a * side + b * other) for point in (start, end) for a in (-1, 1) for b in (-1, 1)]
    return np.array(corners), np.concatenate(triangles).astype(np.uint16)


def view_colour(index: int, views: int) -> tuple[int, int, int]:
    """From red for the first view over yellow to blue for the last."""
    stops = np.array([[230, 60, 50], [245, 170, 40], [70, 180, 90], [40, 120, 220]], float)
    place = index / max(views - 1, 1) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    red, green, blue = (stops[low] + (place - low) * (stops[low + 1] - stops[low])).round().astype(int).tolist()
    return red, green, blue


# The other files


def write_ply(points: Points, path: Path) -> None:
    """Binary PLY, little-endian: x, y, z as floats and red, green, blue as bytes, in the world."""
    vertex = np.empty(len(points.xyz), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = points.xyz, points.rgb
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertex)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    path.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode() + vertex.tobytes())


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Row3 = tuple[float, float, float]
Row4 = tuple[float, float, float, float]
Matrix33 = tuple[Row3, Row3, Row3]
Matrix34 = tuple[Row4, Row4, Row4]


class DepthRecord(_Strict):
    """A depth map: a PNG of 16 bits of grey. Depth along z is its value times `scale`; nowhere is it 0.

    It shows the part of the picture that the network saw, at the network's size, through `intrinsics` of its own.
    """

    file: str
    width: int
    height: int
    scale: float
    intrinsics: Matrix33


class CameraRecord(_Strict):
    """One view: the picture, and the pinhole camera that took it, without distortion.

    x = intrinsics · (extrinsics · (X, 1)): X in the world, x in the picture's own pixels, whose centres are integers.
    """

    file: str
    width: int
    height: int
    intrinsics: Matrix33
    extrinsics: Matrix34  # camera-from-world
    depth: DepthRecord | None = None


class CamerasFile(_Strict):
    """`cameras.json`. The world is the first view's camera: x right, y down, z forward; its unit is arbitrary."""

    version: Literal[1] = 1
    world: Literal["first camera, OpenCV axes, arbitrary unit"] = "first camera, OpenCV axes, arbitrary unit"
    glb_from_world: Matrix33 | None = None  # the rotation between scene.glb's axes and the world
    views: tuple[CameraRecord, ...]


def cameras_of(views: Sequence[View], depth: Sequence[DepthRecord] | None = None) -> CamerasFile:
    records = [
        CameraRecord(
            file=view.name,
            width=view.width,
            height=view.height,
            intrinsics=view.intrinsics.tolist(),
            extrinsics=view.extrinsics.tolist(),
            depth=depth[index] if depth else None,
        )
        for index, view in enumerate(views)
    ]
    return CamerasFile(glb_from_world=upright(views).tolist(), views=tuple(records))


def write_depth(view: View, path: Path) -> DepthRecord:
    scale = float(view.depth.max()) / 65535
    values = (view.depth.astype(np.float64) / scale).round().clip(1, 65535).astype(np.uint16)
    Image.fromarray(values).save(path, compress_level=3)
    height, width = view.depth.shape
    return DepthRecord(
        file=path.name, width=width, height=height, scale=scale, intrinsics=view.depth_intrinsics.tolist()
    )


def write(
    views: Sequence[View],
    folder: Path,
    formats: Sequence[str],
    keep: PointFilter = PointFilter(),
) -> tuple[tuple[OutputFile, ...], int]:
    """The files asked for, and `scene.png` always, into `folder`. Returns them, and how many points they hold."""
    points = points_of(views, keep)
    files = []

    def made(name: str, media_type: str) -> Path:
        files.append(OutputFile(name, media_type, folder / name))
        return folder / name

    if "glb" in formats:
        write_glb(points, views, made("scene.glb", "model/gltf-binary"))
    if "ply" in formats:
        write_ply(points, made("scene.ply", "application/octet-stream"))
    depth = None
    if "depth" in formats:
        depth = [write_depth(view, made(f"depth-{i:03}.png", "image/png")) for i, view in enumerate(views)]
    if "cameras" in formats or depth:  # depth maps mean nothing without their scale
        cameras = cameras_of(views, depth)
        made("cameras.json", "application/json").write_text(cameras.model_dump_json(indent=1) + "\n")
    picture(points, views).save(made("scene.png", "image/png"))
    return tuple(files), len(points.xyz)


# The picture

BACKGROUND = (22, 24, 29)
OVERSAMPLE = 2
LARGEST_SPLAT = 7  # pixels of the oversampled picture, from its middle
STEP = 0.012  # in log2 of depth: between the discs of one surface there are smaller ones


def picture(points: Points, views: Sequence[View], width: int = 1440, height: int = 600) -> Image.Image:
    """The points seen from two sides, with the cameras that took the pictures."""
    panel = ((width - 4) // 2, height)
    sheet = Image.new("RGB", (width, height), (60, 63, 70))
    for index, side in enumerate((-1, 1)):
        sheet.paste(_seen_from(points, views, side, panel), (index * (panel[0] + 4), 0))
    return sheet


def _seen_from(points: Points, views: Sequence[View], side: int, panel: tuple[int, int]) -> Image.Image:
    width, height = (length * OVERSAMPLE for length in panel)
    focal = height / 2 / math.tan(math.radians(24))
    rotation, centre, distance = _stand(points, views, side, np.array([width, height]) / 2 / focal)

    clouds: list[Cloud] = [(points.xyz, points.rgb, points.size, 0.0)]
    reach = frustum_length(points, views)
    for index, view in enumerate(views):
        clouds += _frustum_cloud(view, reach, view_colour(index, len(views)))
    xyz = np.concatenate([cloud[0] for cloud in clouds]).astype(np.float32)
    rgb = np.concatenate([cloud[1] for cloud in clouds])
    size = np.concatenate([np.broadcast_to(np.float32(cloud[2]), len(cloud[0])) for cloud in clouds])
    least = np.concatenate([np.full(len(cloud[0]), cloud[3], np.float32) for cloud in clouds])

    local = (xyz - centre.astype(np.float32)) @ rotation.T.astype(np.float32)
    z = local[:, 2] + np.float32(distance)
    ahead = z > 0.15 * distance
    local, z, rgb, size, least = local[ahead], z[ahead], rgb[ahead], size[ahead], least[ahead]
    u = (local[:, 0] / z * focal + width / 2).round().astype(np.int32)
    v = (local[:, 1] / z * focal + height / 2).round().astype(np.int32)
    radius = np.clip(0.65 * size * focal / z, least, LARGEST_SPLAT)
    depth, colour = _splat(u, v, z, rgb, radius, (width, height))
    shown = Image.fromarray(_shaded(depth, colour))
    return shown.resize(panel, Image.Resampling.BOX)


def _stand(
    points: Points, views: Sequence[View], side: int, slopes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Where the picture is taken from: rotation from the world, the point that is looked at, and how far it is.

    To the left or to the right of the cameras' middle, and as far behind as it takes to see them all, within limits.
    `slopes` [2] are the tangents of half the picture's angles.
    """
    up, centre = up_of(views), _looked_at(points, views)
    away = np.mean([view.centre for view in views], axis=0) - centre
    level = away - (away @ up) * up
    if np.linalg.norm(level) < 1e-6 * max(float(np.linalg.norm(away)), 1e-9):
        level = -views[0].extrinsics[2, :3] + (views[0].extrinsics[2, :3] @ up) * up
    level /= max(np.linalg.norm(level), 1e-9)
    turn = math.radians(40) * side
    beside = level * math.cos(turn) + np.cross(up, level) * math.sin(turn)
    rise = math.radians(36)
    out = beside * math.cos(rise) + up * math.sin(rise)
    right = np.cross(up, out)
    right /= np.linalg.norm(right)
    rotation = np.stack((right, np.cross(right, out), -out))
    cameras = np.stack([view.centre - centre for view in views])
    farthest = max(float(np.linalg.norm(cameras, axis=1).max()), 1e-3)
    local = cameras @ rotation.T
    all_seen = float((np.abs(local[:, :2]) / (0.9 * slopes) - local[:, 2:]).max())
    return rotation, centre, min(max(all_seen, 1.25 * farthest), 1.8 * farthest)


def _looked_at(points: Points, views: Sequence[View]) -> np.ndarray:
    """The place nearest to all optical axes; where these leave it open, nearest to the middle of the points."""
    middle = np.median(points.xyz, axis=0)
    left, right = 0.05 * np.eye(3), 0.05 * middle
    for view in views:
        forward = view.extrinsics[2, :3]
        across = (np.eye(3) - np.outer(forward, forward)) / len(views)
        left, right = left + across, right + across @ view.centre
    return np.linalg.solve(left, right)


# Points in the world, their colours, their size (one for all, or each its own), their least size in pixels.
Cloud = tuple[np.ndarray, np.ndarray, np.ndarray | float, float]


def _frustum_cloud(view: View, length: float, tint: tuple[int, int, int]) -> list[Cloud]:
    """A frustum's edges, and its picture."""
    lines = frustum_lines(view, length)
    steps = np.linspace(0, 1, 300)[:, None, None]
    edges = (lines[:, 0] * (1 - steps) + lines[:, 1] * steps).reshape(-1, 3)
    across = (np.arange(64) + 0.5) * view.width / 64 - 0.5
    down = (np.arange(64) + 0.5) * view.height / 64 - 0.5
    u, v = np.meshgrid(across, down)
    pixels = np.stack((u, v, np.ones_like(u)), axis=-1).reshape(-1, 3)
    plane = pixels @ np.linalg.inv(view.intrinsics).T * length
    seen = (view.depth_intrinsics @ (plane / length).T).T[:, :2].round().astype(int)
    inside = ((seen >= 0) & (seen < view.pixels.shape[1::-1])).all(axis=1)
    shown = view.pixels[seen[inside, 1], seen[inside, 0]]
    spacing = length * view.width / 64 / view.intrinsics[0, 0]

    def world(xyz: np.ndarray) -> np.ndarray:
        return (xyz - view.extrinsics[:, 3]) @ view.extrinsics[:, :3]

    return [
        (world(edges), np.tile(np.array(tint, np.uint8), (len(edges), 1)), 0.0, 1.3 * OVERSAMPLE),
        (world(plane[inside]), shown, 1.3 * spacing, 1.0),
    ]


def _splat(
    u: np.ndarray, v: np.ndarray, z: np.ndarray, rgb: np.ndarray, radius: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Discs of `radius` pixels, the nearest in front: depth [h, w], inf where there is none, and colours [h, w, 3]."""
    width, height = size
    edge = LARGEST_SPLAT  # around the picture, so that no disc is written past a row's end
    inside = np.flatnonzero((u >= -edge) & (u < width + edge) & (v >= -edge) & (v < height + edge))
    order = inside[np.argsort(-z[inside], kind="stable")]
    stride = width + 4 * edge
    place, z, radius = (v[order] + 2 * edge) * stride + u[order] + 2 * edge, z[order], radius[order]
    depth = np.full(stride * (height + 4 * edge), np.inf, np.float32)
    owner = np.zeros(len(depth), np.int64)
    reach = range(-edge, edge + 1)
    for distance, step in sorted((math.hypot(dx, dy), dy * stride + dx) for dy in reach for dx in reach):
        large = radius >= distance
        order, place, z, radius = order[large], place[large], z[large], radius[large]
        there = place + step
        nearer = z < depth[there]
        there = there[nearer]
        # From far to near: where several fall on a pixel, numpy keeps what was written last.
        depth[there], owner[there] = z[nearer], order[nearer]
    crop = (slice(2 * edge, 2 * edge + height), slice(2 * edge, 2 * edge + width))
    return depth.reshape(-1, stride)[crop], rgb[owner.reshape(-1, stride)[crop]]


def _shaded(depth: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Eye-dome lighting (Boucheny 2009): what lies behind its neighbours is darker. uint8 [h, w, 3]."""
    logs = np.log2(depth)
    hidden = np.zeros_like(logs)
    for step in (1, 3):
        padded = np.pad(logs, step, mode="edge")
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            beside = padded[
                step + dy * step : step + dy * step + logs.shape[0], step + dx * step : step + dx * step + logs.shape[1]
            ]
            with np.errstate(invalid="ignore"):
                hidden += np.clip(np.nan_to_num(logs - beside - STEP, nan=0.0, posinf=0.0, neginf=0.0), 0, 0.1)
    light = np.exp(-4.0 * hidden)[..., None]
    return np.where(np.isinf(depth)[..., None], np.array(BACKGROUND), colour * light).astype(np.uint8)
