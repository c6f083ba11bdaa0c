import torch

from models.demo.video import captions, measure, render


def test_rendered_clips_are_read_right_and_shuffled_captions_are_not():
    """A sixteenth of the clips of `python -m models.demo.video.evaluate --truth`, at a quarter of their size."""
    clips = captions.held_out(0)[torch.arange(0, 64, 4)]
    reading = measure.read(render.render(clips, 17, 96, 160))
    right = (reading.colour == clips.colour[:, 0]) & (reading.direction == clips.direction)
    assert right.float().mean() >= 0.98
    order = torch.arange(16).roll(1)
    assert ((reading.colour == clips.colour[order, 0]) & (reading.direction == clips.direction[order])).sum() <= 1


def test_a_still_picture_has_no_direction():
    video = render.render(captions.held_out(0)[slice(0, 2)], 5, 48, 80)[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert measure.read(video).direction.tolist() == [-1, -1]


def test_gradient_energy_is_quadratic_in_contrast():
    video = torch.randn(1, 3, 4, 8, 8)
    (s, t), (s4, t4) = measure.gradient_energy(video), measure.gradient_energy(2 * video)
    assert abs(s4 / s - 4) < 1e-5
    assert abs(t4 / t - 4) < 1e-5
