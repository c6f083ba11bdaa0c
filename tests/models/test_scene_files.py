import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from PIL import Image
from pydantic import ValidationError

from models import scene_files
from models.scene_files import PointFilter, View, picture, points_of, up_of, upright, write

EVERYTHING = PointFilter(drop=0, edge=10.0)
FLOAT32 = 1e-5  # of coordinates of a few units
LEVEL = np.cos(np.radians(5))  # three cameras that look down: the mean of their own up pulls a little
SIXTEEN_BITS = 0.5 / 65535 * 1.01


def looking(position, target, roll=0.0, up=(0, -1.0, 0)):
    """Camera-from-world [3, 4]. The world's y points down, as a first camera's does."""
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    rotation = np.stack(
        (np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward)
    )
    return np.concatenate((rotation, -rotation @ np.asarray(position, float)[:, None]), axis=1)


def floor_view(position, name="a.jpg", roll=0.0, size=(40, 60), scale=3):
    """A camera over the plane y = 1, on which red and green tell x and z. The picture is `scale` times as large."""
    height, width = size
    intrinsics = np.array([[50.0, 0, width / 2], [0, 52.0, height / 2], [0, 0, 1]])
    extrinsics = looking(position, (0, 1.0, 4.0), roll)
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack((u, v, np.ones_like(u)), -1) @ np.linalg.inv(intrinsics).T @ extrinsics[:, :3]
    depth = (1.0 - position[1]) / rays[..., 1]
    assert (depth > 0).all()
    where = rays * depth[..., None] + position
    pixels = np.stack((128 + 30 * where[..., 0], 30 * where[..., 2], 0 * depth), -1).clip(0, 255)
    larger = np.diag([scale, scale, 1.0])
    confidence = np.linspace(1, 2, width * height, dtype=np.float32).reshape(height, width)
    return View(
        name, width * scale, height * scale, larger @ intrinsics, extrinsics, pixels.round().astype(np.uint8),
        depth.astype(np.float32), confidence, intrinsics,
    )  # fmt: skip


@pytest.fixture
def views():
    return [floor_view((0, -2, 0)), floor_view((2, -3, 0.5), "b.jpg"), floor_view((-1.5, -1.5, 0.3), "c.jpg")]


def test_a_plane_stays_a_plane_in_every_file(views, tmp_path):
    files, count = write(views, tmp_path, scene_files.FORMATS, EVERYTHING)
    assert count == 3 * 40 * 60
    cloud = trimesh.load(tmp_path / "scene.ply")
    assert cloud.vertices.shape == (count, 3)
    assert np.abs(cloud.vertices[:, 1] - 1).max() < FLOAT32
    told = np.stack((128 + 30 * cloud.vertices[:, 0], 30 * cloud.vertices[:, 2]), -1).clip(0, 255)
    assert np.abs(cloud.colors[:, :2] - told).max() < 0.51

    scene = trimesh.load(tmp_path / "scene.glb")
    points = scene.geometry["points"]
    assert points.vertices.shape == (count, 3)
    matrix, _ = scene.graph.get("points")
    assert np.allclose(matrix, np.eye(4))
    offsets = points.vertices - points.vertices.mean(0)
    normal = np.linalg.svd(offsets, full_matrices=False)[2][-1]
    assert np.abs(offsets @ normal).max() < FLOAT32
    assert abs(normal[1]) > LEVEL  # the floor lies level
    turned = cloud.vertices @ np.array(json.loads((tmp_path / "cameras.json").read_text())["glb_from_world"]).T
    assert np.abs(turned - points.vertices).max() < FLOAT32
    assert {file.name for file in files} == {path.name for path in tmp_path.iterdir()}
    assert all(file.path == tmp_path / file.name for file in files)


def test_vertex_colours_of_the_glb_are_linear_light(views, tmp_path):
    write(views, tmp_path, ("glb",), EVERYTHING)
    seen = points_of(views, EVERYTHING).rgb / 255
    want = np.where(seen <= 0.04045, seen / 12.92, ((seen + 0.055) / 1.055) ** 2.4)
    got = trimesh.load(tmp_path / "scene.glb").geometry["points"].colors[:, :3] / 255
    assert np.abs(got - want).max() < 1.01 / 255  # trimesh reads them into bytes


def test_a_glb_is_laid_out_as_the_specification_has_it(views, tmp_path):
    write(views, tmp_path, ("glb",), EVERYTHING)
    content = (tmp_path / "scene.glb").read_bytes()
    magic, version, length, text_length, kind = struct.unpack("<4sIII4s", content[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    document = json.loads(content[20 : 20 + text_length])
    binary_length, kind = struct.unpack("<I4s", content[20 + text_length : 28 + text_length])
    binary = content[28 + text_length :]
    assert (binary_length, kind) == (len(binary), b"BIN\0")
    assert document["buffers"] == [{"byteLength": binary_length}]
    for accessor in document["accessors"]:
        part = document["bufferViews"][accessor["bufferView"]]
        assert part["byteOffset"] % 4 == 0
        values = np.frombuffer(
            binary[part["byteOffset"] : part["byteOffset"] + part["byteLength"]],
            {5126: "<f4", 5123: "<u2"}[accessor["componentType"]],
        ).reshape(accessor["count"], -1)
        if "min" in accessor:
            assert (values.min(0).tolist(), values.max(0).tolist()) == (accessor["min"], accessor["max"])


def test_every_view_has_its_camera_and_its_frustum_where_it_stood(views, tmp_path):
    write(views, tmp_path, ("glb",), EVERYTHING)
    content = (tmp_path / "scene.glb").read_bytes()
    document = json.loads(content[20 : 20 + struct.unpack("<I", content[12:16])[0]])
    scene, turn = trimesh.load(tmp_path / "scene.glb"), upright(views)
    for index, view in enumerate(views):
        node = document["nodes"][1 + index]
        matrix = np.reshape(node["matrix"], (4, 4)).T
        assert np.allclose(matrix[:3, 3], turn @ view.centre)
        assert np.allclose(-matrix[:3, 2], turn @ view.extrinsics[2, :3])  # a glTF camera looks along -z
        assert np.allclose(matrix[:3, 1], turn @ -view.extrinsics[1, :3])
        lens = document["cameras"][node["camera"]]["perspective"]
        assert lens["yfov"] == pytest.approx(2 * np.arctan(20 / 52))
        assert lens["aspectRatio"] == pytest.approx((30 / 50) / (20 / 52))
        frustum = scene.geometry[f"view {index}"]
        assert frustum.is_watertight
        assert frustum.volume > 0  # its faces look outwards
        corners = trimesh.transform_points(frustum.vertices, matrix)
        nearest = np.linalg.norm(corners - turn @ view.centre, axis=1).min()
        assert nearest < 0.05 * np.ptp(corners, axis=0).max()


def test_cameras_come_back_and_show_every_point_at_its_pixel(views, tmp_path):
    write(views, tmp_path, ("ply", "cameras"), EVERYTHING)
    back = scene_files.CamerasFile.model_validate_json((tmp_path / "cameras.json").read_text())
    cloud = trimesh.load(tmp_path / "scene.ply").vertices.reshape(3, 40, 60, 3)
    u, v = np.meshgrid(np.arange(60), np.arange(40))
    for record, view, points in zip(back.views, views, cloud, strict=True):
        assert (record.file, record.width, record.height, record.depth) == (view.name, 180, 120, None)
        assert np.array_equal(record.extrinsics, view.extrinsics)
        assert np.array_equal(record.intrinsics, view.intrinsics)
        camera = points @ np.array(record.extrinsics)[:, :3].T + np.array(record.extrinsics)[:, 3]
        seen = camera @ np.array(record.intrinsics).T
        assert np.abs(seen[..., 0] / seen[..., 2] - 3 * u).max() < 0.01
        assert np.abs(seen[..., 1] / seen[..., 2] - 3 * v).max() < 0.01


def test_a_cameras_file_with_a_field_too_many_is_refused(views):
    given = scene_files.cameras_of(views).model_dump() | {"unit": "metre"}
    with pytest.raises(ValidationError, match="unit"):
        scene_files.CamerasFile.model_validate(given)


def test_depth_maps_tell_depth_by_their_scale(views, tmp_path):
    write(views, tmp_path, ("depth",))
    cameras = scene_files.CamerasFile.model_validate_json((tmp_path / "cameras.json").read_text())
    for index, (record, view) in enumerate(zip(cameras.views, views, strict=True)):
        assert record.depth.file == f"depth-{index:03}.png"
        with Image.open(tmp_path / record.depth.file) as png:
            values = np.asarray(png)
        assert (values.dtype, values.shape) == (np.uint16, (record.depth.height, record.depth.width))
        assert values.min() > 0
        assert np.abs(values * record.depth.scale - view.depth).max() < SIXTEEN_BITS * view.depth.max()


def test_the_least_sure_share_is_left_out(views):
    points = points_of(views[:1], PointFilter(drop=25, edge=10.0))
    assert len(points.xyz) == 0.75 * 40 * 60
    assert np.array_equal(points.xyz, points_of(views[:1], EVERYTHING).xyz[600:])  # the first rows are the least sure


def test_what_floats_between_near_and_far_is_left_out(views):
    depth = np.full((40, 60), 2.0, np.float32)
    depth[:, 30:] = 3.0
    depth[:, 30] = 2.5
    points = points_of([replace(views[0], depth=depth)], PointFilter(drop=0, edge=0.05))
    assert len(points.xyz) == 40 * 57  # without the column between and its neighbours
    noise = np.random.default_rng(0).uniform(1, 5, (40, 60)).astype(np.float32)
    assert len(points_of([replace(views[0], depth=noise)], PointFilter(drop=0, edge=1e-4)).xyz) == 40 * 60


def test_too_many_points_are_thinned_evenly_and_the_same_ones_each_time(views):
    few = points_of(views, replace(EVERYTHING, most=1000))
    assert len(few.xyz) == 1000
    assert np.array_equal(few.xyz, points_of(views, replace(EVERYTHING, most=1000)).xyz)
    every = {tuple(row) for row in points_of(views, EVERYTHING).xyz.tolist()}
    assert all(tuple(row) in every for row in few.xyz.tolist())


@pytest.mark.parametrize("field", [{"drop": 100}, {"drop": -1}, {"edge": 0}, {"most": 0}])
def test_a_filter_that_cannot_be_is_refused(field):
    with pytest.raises(ValueError, match="drop is 0 to 100"):
        PointFilter(**field)


def test_up_is_what_level_cameras_agree_on(views):
    assert up_of(views) @ (0, -1, 0) > LEVEL
    rolled = [floor_view((0, -2, 0), roll=0.15), floor_view((2, -3, 0.5), roll=-0.1), floor_view((-2, -1.5, 0.3))]
    assert up_of(rolled) @ (0, -1, 0) > np.cos(0.2)
    alone = up_of(views[1:2])
    assert alone @ -views[1].extrinsics[1, :3] > 1 - 1e-9  # one camera: its own up


def test_the_glbs_axes_are_turned_and_not_mirrored(views):
    down = replace(views[0], extrinsics=looking((0, -3, 0), (0, 1, 0), up=(0, 0, 1.0)))
    for case in (views, views[1:2], [down]):
        turn = upright(case)
        assert np.allclose(turn @ turn.T, np.eye(3))
        assert np.linalg.det(turn) == pytest.approx(1)
        assert np.allclose(turn @ up_of(case), (0, 1, 0))
    assert (upright(views) @ views[0].extrinsics[2, :3])[[0, 2]] @ (0, 1) < 0
    assert abs((upright(views) @ views[0].extrinsics[2, :3])[0]) < 1e-9


def test_the_picture_shows_the_nearer_thing_and_the_cameras(views):
    size = {"width": 604, "height": 250}
    floor = np.asarray(picture(points_of(views, EVERYTHING), views, **size)).astype(int)
    assert floor.shape == (250, 604, 3)
    half = 300
    for panel in (floor[:, :half], floor[:, -half:]):
        assert (np.abs(panel - scene_files.BACKGROUND).max(-1) > 20).mean() > 0.2  # points
    assert not np.array_equal(floor[:, :half], floor[:, -half:])

    points = points_of(views, EVERYTHING)
    roof = replace(
        points, xyz=points.xyz * (1, 0, 1) + np.float32((0, -1.0, 0)), rgb=np.full_like(points.rgb, (0, 0, 255))
    )
    both = scene_files.Points(*(np.concatenate((getattr(roof, k), getattr(points, k))) for k in ("xyz", "rgb", "size")))
    hidden = np.asarray(picture(both, views, **size)).astype(int)
    blue = (hidden[..., 2] > 100) & (hidden[..., :2].max(-1) < 60)
    assert blue.mean() > 0.1
    assert not ((np.abs(hidden - floor).max(-1) == 0) & blue).any()  # no floor shines through

    for index in range(3):
        edge = np.array(scene_files.view_colour(index, 3))
        assert (np.abs(floor - edge).max(-1) < 30).any()


def test_points_that_no_format_asks_for_are_still_drawn(views, tmp_path):
    files, _ = write(views[:1], tmp_path, ())
    assert [file.name for file in files] == ["scene.png"]
