import numpy as np
import pytest
from PIL import Image

from models import start_image
from models.base import BadInput


@pytest.fixture
def picture(tmp_path):
    """120 x 60, each half of it of one colour, as a PNG."""
    halves = np.zeros((60, 120, 3), np.uint8)
    halves[:, :60], halves[:, 60:] = (200, 0, 0), (0, 0, 200)
    path = tmp_path / "picture.png"
    Image.fromarray(halves).save(path)
    return path


def test_a_picture_of_the_film_s_shape_is_scaled_as_in_diffusers_example(picture):
    with Image.open(picture) as image:
        want = np.asarray(image.resize((64, 32)))
    assert np.array_equal(np.asarray(start_image.fitted(picture, 64, 32)), want)


@pytest.mark.parametrize(("width", "height"), [(48, 48), (32, 96), (240, 48), (7, 5), (121, 61)])
def test_another_shape_is_covered_and_cut_to_its_middle(picture, width, height):
    fitted = start_image.fitted(picture, width, height)
    assert (fitted.size, fitted.mode) == ((width, height), "RGB")
    pixels = np.asarray(fitted)
    assert (pixels[:, : width // 4] == (200, 0, 0)).all(), "nothing is put around it"
    assert (pixels[:, -(width // 4) :] == (0, 0, 200)).all(), "and both halves are left, for the middle is"


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1)])
def test_a_picture_of_any_shape_becomes_no_larger_than_the_film(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "strip.png")
    fitted = start_image.fitted(tmp_path / "strip.png", 832, 480)  # all that covers a film would be 40 GB
    assert (np.asarray(fitted) == (10, 200, 30)).all()
    assert fitted.size == (832, 480)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_picture_of_any_mode_becomes_rgb(picture, tmp_path, mode):
    with Image.open(picture) as image:
        image.convert(mode).save(tmp_path / "other.png")
    assert start_image.fitted(tmp_path / "other.png", 32, 16).mode == "RGB"


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_what_cannot_be_read_is_refused_by_the_field_s_name(tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadInput, match="image cannot be read") as refused:
        start_image.fitted(tmp_path / "x.png", 32, 16)
    assert refused.value.field == "image"


def test_the_pictures_that_come_along_are_there():
    for _, name in (*start_image.CALIBRATION, *start_image.JUDGING):
        assert start_image.fitted(start_image.shipped(name), 832, 480).size == (832, 480)
