from dataclasses import fields

import pytest
import torch

from models.demo.scene import scenes


def numbers(drawn):
    return torch.cat([getattr(drawn, field.name).flatten() for field in fields(drawn)])


def draw(split="train", seed=0, batch=0, count=400, views=4, **options):
    return scenes.draw(scenes.generator(split, seed, batch), count, views, **options)


def positions(drawn):
    rotation, translation = drawn.extrinsics[..., :3], drawn.extrinsics[..., 3:]
    return -(rotation.transpose(-1, -2) @ translation)[..., 0]


def test_split_seed_and_batch_name_the_scenes():
    assert torch.equal(numbers(draw(count=3)), numbers(draw(count=3)))
    others = [draw("held-out", count=3), draw(seed=1, count=3), draw(batch=1, count=3)]
    assert all(not torch.equal(numbers(draw(count=3)), numbers(other)) for other in others)


def test_no_generator_serves_both_splits():
    corners = [0, 1, 2, 2**20, 2**21 - 1]
    first = [
        float(torch.rand((), generator=scenes.generator(split, seed, batch), dtype=torch.float64))
        for split in ("train", "held-out")
        for seed in (0, 1, 5, 2**10 - 1)
        for batch in corners
    ]
    assert len(set(first)) == len(first)
    for seed, batch in ((-1, 0), (2**10, 0), (0, 2**21)):
        with pytest.raises(ValueError, match="below 1024"):
            scenes.generator("train", seed, batch)


def test_azimuths_lie_evenly_within_the_spread_around_the_first_view():
    for spread in (60.0, 20.0):
        where = positions(draw(spread=spread))
        azimuth = torch.atan2(where[..., 1], where[..., 0])
        difference = torch.rad2deg(torch.atan2((azimuth - azimuth[:, :1]).sin(), (azimuth - azimuth[:, :1]).cos()))[
            :, 1:
        ]
        assert difference.abs().max() <= spread + 0.01
        shares = torch.histc(difference, bins=4, min=-spread, max=spread) / difference.numel()
        assert (shares - 0.25).abs().max() < 0.06  # four standard deviations at 1,200 draws


def test_elevation_and_distance_keep_to_their_ranges_and_fill_them():
    offset = positions(draw()) - torch.tensor([0.0, 0.0, scenes.CENTRE_HEIGHT])
    distance = offset.norm(dim=-1)
    elevation = torch.rad2deg(torch.asin(offset[..., 2] / distance))
    assert 4.99 < elevation.min() < 6
    assert 59 < elevation.max() < 60.01
    assert 1.9 < distance.max() / distance.min() < 2.001


def test_cameras_are_rotations_that_look_at_the_scene():
    drawn = draw()
    rotation = drawn.extrinsics[..., :3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(rotation.shape[:2]))
    torch.testing.assert_close(
        rotation @ rotation.transpose(-1, -2), torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0
    )
    centre = rotation @ torch.tensor([0.0, 0.0, scenes.CENTRE_HEIGHT])[:, None] + drawn.extrinsics[..., 3:]
    x, y, z = centre[..., 0].unbind(-1)
    assert (z > 0).all()
    assert (torch.hypot(x, y) / z).max() < torch.tan(drawn.fov.min() / 2)  # in sight
    down = rotation[..., 1, 2]  # how much the picture's y axis points up in the world
    assert (down < 0).all()


def test_a_camera_is_inside_the_room_and_above_the_ground():
    drawn = draw()
    where = positions(drawn)
    assert (where[..., :2].norm(dim=-1) < drawn.room[:, None, :2].amin(-1)).all()
    assert (where[..., 2] < drawn.room[:, None, 2]).all()
    assert (where[..., 2] > drawn.amplitude).all()


def test_no_camera_is_inside_an_object():
    drawn = draw(count=2000)
    where = positions(drawn)[:, :, None]  # [B, S, 1, 3]
    offset = where - drawn.centre[:, None]
    cosine, sine = (drawn.turn[:, None, :, part] for part in range(2))
    x, y = offset[..., 0] * cosine + offset[..., 1] * sine, offset[..., 1] * cosine - offset[..., 0] * sine
    scaled = torch.stack((x, y, offset[..., 2]), dim=-1).abs() / drawn.half[:, None]
    assert (scaled.amax(-1)[(drawn.half[:, None, :, 0] > 0).expand_as(x)] > 1).all()


def test_a_move_keeps_every_number():
    drawn = draw(count=2)
    assert torch.equal(numbers(drawn.to("cpu")), numbers(drawn))
    other = draw(seed=5, count=2)
    other.copy_(drawn)
    assert torch.equal(numbers(other), numbers(drawn))
