from dataclasses import replace

import pytest
import torch

from models.cameras import unproject
from models.demo.scene import render, scenes, textures

# Points found through float32 depths of up to ten units.
ON_SURFACE = 2e-4


@pytest.fixture(scope="module")
def pyramid():
    return textures.load()


def draw(count=2, views=3, seed=0):
    return scenes.draw(scenes.generator("train", seed, 0), count, views)


def emptied(drawn):
    return replace(drawn, half=torch.full_like(drawn.half, -1.0), amplitude=torch.zeros_like(drawn.amplitude))


def points(drawn, size):
    views = render.render(drawn, size, textures.load(), samples=1)
    return unproject(views.depth, views.extrinsics, views.intrinsics), views


def test_an_empty_room_with_a_flat_floor_has_the_depth_of_its_planes():
    drawn = emptied(draw())
    where, views = points(drawn, 16)
    room = drawn.room[:, :, None, None, None]
    x = where[..., 0] * room[:, 3] + where[..., 1] * room[:, 4]
    y = where[..., 1] * room[:, 3] - where[..., 0] * room[:, 4]
    gaps = torch.stack((where[..., 2], room[:, 2] - where[..., 2], room[:, 0] - x.abs(), room[:, 1] - y.abs()), dim=-1)
    assert gaps.min() > -ON_SURFACE  # nothing outside
    assert gaps.amin(-1).max() < ON_SURFACE  # everything on a plane
    assert views.depth.isfinite().all()


def test_the_height_field_is_hit_where_it_is():
    drawn = replace(emptied(draw(6)), amplitude=torch.full((6, 1), 0.12))
    where, _ = points(drawn, 16)
    height = render._height(drawn, where[..., 0], where[..., 1])
    inside = where[..., :2].norm(dim=-1) < 2.5
    assert inside.any()
    assert (where[..., 2] - height)[inside].abs().max() < ON_SURFACE


def test_a_ball_and_a_box_are_hit_where_they_are():
    drawn = emptied(draw(4, 2))
    half, centre = drawn.half.clone(), drawn.centre.clone()
    half[:2, 0], half[2:, scenes.BOXES] = 0.4, 0.4  # a cube in two scenes, a ball in two
    centre[:2, 0], centre[2:, scenes.BOXES] = torch.tensor([0.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, 0.5])
    drawn = replace(drawn, half=half, centre=centre)
    where, views = points(drawn, 24)
    _, hit = render._nearest(drawn, *render._rays(drawn, 24, 0.0, 0.0))
    local = where - torch.tensor([0.0, 0.0, 0.5])
    ball = hit[2:] == scenes.BOXES
    assert ball.any()
    assert (local[2:].norm(dim=-1)[ball] - 0.4).abs().max() < ON_SURFACE
    cosine, sine = (drawn.turn[:2, 0, i, None, None, None] for i in range(2))
    x, y = local[:2, ..., 0] * cosine + local[:2, ..., 1] * sine, local[:2, ..., 1] * cosine - local[:2, ..., 0] * sine
    box = hit[:2] == 0
    assert box.any()
    farthest = torch.stack((x, y, local[:2, ..., 2]), dim=-1).abs().amax(-1)
    assert (farthest[box] - 0.4).abs().max() < ON_SURFACE
    assert (views.depth > 0).all()


def test_the_nearest_surface_is_never_behind_another():
    """A denser look at the same rays: no shape lies between the camera and the hit."""
    drawn = draw(3, 2, seed=3)
    where, views = points(drawn, 12)
    origin = -(views.extrinsics[..., :3].transpose(-1, -2) @ views.extrinsics[..., 3:])[..., 0][:, :, None, None]
    for share in torch.linspace(0.05, 0.99, 40):
        between = origin + (where - origin) * share
        for index in range(scenes.SHAPES):
            local = between - drawn.centre[:, index, None, None, None]
            cosine, sine = (drawn.turn[:, index, i, None, None, None] for i in range(2))
            x, y = local[..., 0] * cosine + local[..., 1] * sine, local[..., 1] * cosine - local[..., 0] * sine
            scaled = torch.stack((x, y, local[..., 2]), dim=-1) / drawn.half[:, index, None, None, None]
            inside = scaled.abs().amax(-1) if index < scenes.BOXES else scaled.norm(dim=-1)
            there = (drawn.half[:, index, 0] > 0)[:, None, None, None]
            assert not ((inside < 0.99) & there).any()


def test_a_place_seen_by_two_cameras_has_one_colour(pyramid):
    """Colour belongs to the place, not to the camera: what makes matching possible. Exposure apart."""
    drawn = draw(4, 2, seed=1)
    drawn = replace(drawn, gain=torch.ones_like(drawn.gain))
    views = render.render(drawn, 112, pyramid)
    where = unproject(views.depth[:, :1], views.extrinsics[:, :1], views.intrinsics[:, :1])
    other = (views.extrinsics[:, 1, None, None, None, :, :3] @ where[..., None])[..., 0]
    other = other + views.extrinsics[:, 1, None, None, None, :, 3]
    focal = views.intrinsics[:, 1, 0, 0, None, None, None]
    u = (other[..., 0] / other[..., 2] * focal + 56).round().long()
    v = (other[..., 1] / other[..., 2] * focal + 56).round().long()
    inside = (u >= 0) & (u < 112) & (v >= 0) & (v < 112) & (other[..., 2] > 0)
    u, v = u.clamp(0, 111), v.clamp(0, 111)
    place = (v * 112 + u).flatten(1)
    depth = views.depth[:, 1].flatten(1).gather(1, place).view_as(u)
    seen = (inside & ((depth - other[..., 2]).abs() < 0.02 * depth))[:, 0]
    assert seen.float().mean() > 0.1
    first = views.images[:, 0].permute(0, 2, 3, 1)[seen]
    second = views.images[:, 1].flatten(2).gather(2, place[:, None].expand(-1, 3, -1)).view(4, 3, 112, 112)
    second = second.permute(0, 2, 3, 1)[seen]
    assert (first - second).abs().median() < 0.03
    shuffled = second[torch.randperm(len(second))]
    assert (first - shuffled).abs().median() > 0.15


@pytest.mark.parametrize("slope", [0.0, 1e-12, -1e-12])
def test_a_wall_that_a_ray_runs_along_is_never_hit_behind_the_camera(slope):
    drawn = emptied(draw(1, 1))
    room = torch.tensor([[5.0, 4.0, 4.0, 1.0, 0.0]])
    rotation = torch.tensor([[0.0, 1.0, slope], [0.0, 0.0, -1.0], [1.0, slope, 0.0]])
    extrinsics = torch.cat((rotation, -rotation @ torch.tensor([[1.0], [1.0], [1.0]])), dim=1)[None, None]
    drawn = replace(drawn, room=room, extrinsics=extrinsics)  # looks along x, from x = 1
    depth = render.render(drawn, 2, textures.load(), samples=1).depth
    assert depth[0, 0, 1, 1] == pytest.approx(4.0)  # the pixel in the middle looks straight ahead
    assert ((depth > 0) & (depth < 10)).all()


def test_pictures_are_in_range_and_of_the_promised_shapes(pyramid):
    views = render.render(draw(2, 3), 28, pyramid)
    assert views.images.shape == (2, 3, 3, 28, 28)
    assert views.depth.shape == (2, 3, 28, 28)
    assert views.intrinsics.shape == (2, 3, 3, 3)
    assert 0 <= views.images.min() < views.images.max() <= 1
    assert views.images.std() > 0.1


def test_more_samples_smooth_the_picture_and_leave_the_depth(pyramid):
    drawn = draw(2, 2)
    one, four = (render.render(drawn, 56, pyramid, samples) for samples in (1, 5))
    assert torch.equal(one.depth, four.depth)
    assert four.images.diff(dim=-1).abs().mean() < one.images.diff(dim=-1).abs().mean()
    with pytest.raises(ValueError, match="got 3"):
        render.render(drawn, 56, pyramid, samples=3)
