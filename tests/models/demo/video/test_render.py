import pytest
import torch

from models.demo.video import captions, render

UNSEEN = 1e-4  # of a range of 2: float32 sums in another order, and an eightieth of a picture's least step


def test_pixels_lie_between_minus_one_and_one_and_the_object_moves():
    clips = captions.held_out(0)[slice(0, 4)]
    video = render.render(clips, frames=5, height=48, width=80)
    assert video.shape == (4, 3, 5, 48, 80)
    assert video.min() >= -1
    assert video.max() <= 1
    assert (video.diff(dim=2).abs().amax((1, 2, 3, 4)) > 0.3).all()


def test_one_clip_looks_the_same_in_any_batch():
    clips = captions.sample(6, seed=2)
    together = render.render(clips, 3, 48, 80)
    alone = torch.cat([render.render(clips[slice(i, i + 1)], 3, 48, 80) for i in range(6)])
    assert (together - alone).abs().max() < UNSEEN


def test_a_static_camera_leaves_the_background_still():
    clips = captions.held_out(0)[slice(0, 8)]
    video = render.render(clips, 5, 48, 80)
    still = (video.diff(dim=2).abs().amax((1, 2)) == 0).float().mean()
    assert still > 0.8


@pytest.mark.parametrize("name", captions.SHAPES)
def test_every_shape_covers_about_as_much_as_a_circle(name):
    outline, _, hole = render._outlines("cpu")
    i = captions.SHAPES.index(name)
    area = (outline[i] ** 2 - hole[i] ** 2).mean() * torch.pi
    assert 0.45 < area / (torch.pi * 0.9**2) < 1.3
