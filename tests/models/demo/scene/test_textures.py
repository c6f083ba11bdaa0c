import torch

from models.demo.scene import textures


def test_every_level_of_the_pyramid_is_the_mean_of_the_one_before():
    pyramid = textures.load()
    sides = [textures.TILE >> level for level in range(textures.LEVELS)]
    assert pyramid.shape == (len(textures.NAMES), sum(side * side for side in sides), 3)
    levels = pyramid.split([side * side for side in sides], dim=1)
    for side, fine, coarse in zip(sides, levels, levels[1:], strict=False):
        fine = fine.unflatten(1, (side, side)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        torch.testing.assert_close(fine.mean((2, 4)).flatten(1, 2), coarse)


def test_all_tiles_have_one_brightness_and_contrast():
    finest = textures.load()[:, : textures.TILE**2]
    assert (finest.mean((1, 2)) - 0.5).abs().max() < 0.02
    assert finest.std((1, 2)).min() > 0.12
