import numpy as np
import pytest
import torch
from PIL import Image

from models import vggt_images
from models.vggt_images import Placement, place

ROUNDING = 1.01 / 255  # of a resized picture to 8 bits


def saved(folder, width, height, mode="RGB", name="a.png"):
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack((columns * 255 / width, rows * 255 / height, 255 - columns * 255 / width), -1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("framing", "width", "height", "want"),
    [
        ("crop", 1920, 1080, Placement(1920, 1080, 518, 294, 0, 0)),
        ("crop", 1080, 1920, Placement(1080, 1920, 518, 924, 0, -203)),
        ("crop", 640, 640, Placement(640, 640, 518, 518, 0, 0)),
        ("pad", 1920, 1080, Placement(1920, 1080, 518, 294, 0, 112)),
        ("pad", 1080, 1920, Placement(1080, 1920, 294, 518, 112, 0)),
    ],
)
def test_pictures_go_where_the_published_loaders_put_them(framing, width, height, want):
    assert place(width, height, 518, 14, framing) == want


@pytest.mark.parametrize("framing", ["crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(96, 54), (54, 96), (300, 113), (60, 60), (61, 59)])
def test_a_camera_comes_back_to_the_pixels_of_the_picture(framing, width, height, tmp_path):
    """A picture whose red and green are its own coordinates says where each pixel of the network's came from."""
    ramp = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    ramp = np.concatenate((ramp, np.zeros((height, width, 1))), -1).astype(np.uint16)
    assert ramp.max() < 2**9
    Image.fromarray((ramp // 2).astype(np.uint8)).save(tmp_path / "a.png")
    views, (where,) = vggt_images.load([tmp_path / "a.png"], 56, 14, framing)
    rows, columns = where.visible(views.shape[-2:])
    v, u = (rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2
    x, y = views[0, :2, v, u] * 255 * 2 + 0.5  # halved and cut above
    camera = torch.tensor([[50.0, 0, u], [0, 50, v], [0, 0, 1]])
    back = where.to_picture(camera)
    tolerance = 2 * (ROUNDING * 255 + 0.5) / 2
    assert abs(back[0, 2] - x) < tolerance
    assert abs(back[1, 2] - y) < tolerance
    assert back[0, 0] == pytest.approx(50 * width / where.scaled_width)
    assert back[1, 1] == pytest.approx(50 * height / where.scaled_height)


def test_edges_map_to_edges():
    where = place(1920, 1080, 518, 14, "crop")
    camera = torch.tensor([[1.0, 0, 517.5], [0, 1, 293.5], [0, 0, 1]])
    back = where.to_picture(camera)
    torch.testing.assert_close(back[:2, 2], torch.tensor([1919.5, 1079.5]))


def test_what_is_cut_off_is_cut_from_the_resized_picture(tmp_path):
    path = saved(tmp_path, 40, 130)
    views, (where,) = vggt_images.load([path], 56, 14, "crop")
    whole = Image.open(path).resize((where.scaled_width, where.scaled_height), Image.Resampling.BICUBIC)
    want = np.asarray(whole)[-where.top : 56 - where.top] / 255
    got = views[0].permute(1, 2, 0).numpy()
    assert np.abs(got - want).max() < ROUNDING


def test_a_tower_of_pixels_costs_no_memory(tmp_path):
    saved(tmp_path, 2, 20_000)  # whole and resized it would be 157 megapixels
    views, (where,) = vggt_images.load([tmp_path / "a.png"], 56, 14, "crop")
    assert views.shape == (1, 3, 56, 56)
    assert where.scaled_height == 560_000


def test_pictures_of_several_shapes_share_the_largest_height_on_white(tmp_path):
    paths = [saved(tmp_path, 80, 40, name="wide.png"), saved(tmp_path, 40, 40, name="square.png")]
    views, placements = vggt_images.load(paths, 56, 14, "crop")
    assert views.shape == (2, 3, 56, 56)
    assert placements[0].top == 14
    assert (views[0, :, :14] == 1).all()
    assert (views[0, :, 42:] == 1).all()
    assert (views[0, :, 14:42].amin(0) < 1).any(0).all()


def test_padding_is_white_and_content_is_not_touched(tmp_path):
    views, (where,) = vggt_images.load([saved(tmp_path, 28, 56)], 56, 14, "pad")
    rows, columns = where.visible((56, 56))
    inside = torch.zeros(56, 56, dtype=torch.bool)
    inside[rows, columns] = True
    assert (views[0, :, ~inside] == 1).all()
    want = np.asarray(Image.open(tmp_path / "a.png")) / 255
    assert np.abs(views[0, :, rows, columns].permute(1, 2, 0).numpy() - want).max() < 1e-6


def test_what_is_transparent_lies_on_white_and_every_mode_is_read(tmp_path):
    clear = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (vggt_images.load([tmp_path / "clear.png"], 28, 14, "crop")[0] == 1).all()
    for mode in ("L", "P", "1", "CMYK"):
        name = "a.tiff" if mode == "CMYK" else "a.png"
        views, _ = vggt_images.load([saved(tmp_path, 28, 28, mode, name)], 28, 14, "crop")
        assert views.shape == (1, 3, 28, 28)
    deep = Image.fromarray(np.full((28, 28), 30_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    views, _ = vggt_images.load([tmp_path / "deep.png"], 28, 14, "crop")
    assert views.mean().item() == pytest.approx(30_000 / 65_535, abs=1 / 255)


def test_a_picture_without_a_second_side_is_refused():
    with pytest.raises(ValueError, match="4000x20 is too long"):
        place(4000, 20, 518, 14, "crop")
    with pytest.raises(ValueError, match="20x4000 is too long"):
        place(20, 4000, 518, 14, "pad")
