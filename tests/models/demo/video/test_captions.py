import torch

from models.demo.video import captions


def test_no_training_clip_shows_a_held_out_triple():
    clips = captions.sample(20_000, seed=3)
    assert not ((clips.colour[:, 0] + clips.shape[:, 0] + clips.direction) % 8 == 0).any()


def test_every_other_triple_is_trained_on():
    clips = captions.sample(20_000, seed=3)
    seen = set(zip(clips.colour[:, 0].tolist(), clips.shape[:, 0].tolist(), clips.direction.tolist(), strict=True))
    assert len(seen) == 512 - 64


def test_the_held_out_captions_are_64_with_every_colour_and_direction_and_a_static_camera():
    clips = captions.held_out(0)
    assert len(clips) == 64
    assert set(clips.colour[:, 0].tolist()) == set(clips.direction.tolist()) == set(range(8))
    assert not clips.camera.any()
    assert not clips.pair.any()


def test_a_caption_says_what_the_clip_holds():
    clips = captions.held_out(0)
    for i, line in enumerate(captions.describe(clips, seed=1)):
        assert captions.COLOURS[clips.colour[i, 0]] in line
        assert captions.SHAPES[clips.shape[i, 0]] in line
        assert captions.PLACES[clips.place[i]] in line


def test_the_same_seed_gives_the_same_clips_and_words():
    a, b = (captions.sample(50, seed=5) for _ in range(2))
    assert captions.describe(a, 5) == captions.describe(b, 5)
    assert torch.equal(a.start, b.start)


def test_the_moving_object_stays_inside_a_static_frame():
    clips = captions.sample(2000, seed=1)
    for time in (0.0, 1.0):
        centre = clips.start[:, 0] + time * clips.travel
        assert (centre >= 0).all()
        assert (centre <= torch.tensor([captions.ASPECT, 1.0])).all()
