import pytest

pytest.importorskip("triton")

from models.demo.scene import render, render_triton, scenes, textures

# A ray that meets an edge within float32's rounding may fall on either side of it: these few pixels are let off.
EDGES = 0.002


@pytest.mark.parametrize(("count", "views", "size", "samples"), [(2, 3, 28, 5), (3, 1, 19, 1)])
def test_the_kernel_draws_what_the_plain_version_draws(count, views, size, samples, device):
    drawn = scenes.draw(scenes.generator("train", 3, 0), count, views).to(device)
    pyramid = textures.load().to(device)
    images, depth = render_triton.trace(drawn, size, pyramid, samples)
    want_images, want_depth = render.trace(drawn, size, pyramid, samples)
    off = (depth - want_depth).abs() > 1e-3 * want_depth
    assert off.float().mean() <= EDGES
    wrong = (images - want_images).abs().amax(2) > 2e-3
    assert wrong.float().mean() <= EDGES
    assert images.isfinite().all()


def test_every_kind_of_surface_is_in_the_comparison(device):
    drawn = scenes.draw(scenes.generator("train", 3, 0), 2, 3).to(device)
    _, hit = render._nearest(drawn, *render._rays(drawn, 28, 0.0, 0.0))
    kinds = set(hit.unique().tolist())
    assert kinds & set(range(scenes.BOXES))
    assert kinds & set(range(scenes.BOXES, scenes.SHAPES))
    assert scenes.GROUND in kinds
    assert kinds & set(range(scenes.WALLS, scenes.CEILING))
