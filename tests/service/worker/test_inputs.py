"""Uploads are strangers' files: upright RGB pictures come out, or a refusal that names the field."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from models.base import BadInput
from service.settings import Settings
from service.worker.inputs import decode_image, sample_video
from tests.service.support import picture

RED, GREEN = (200, 30, 30), (30, 200, 30)
H264_ROUNDING = 12  # of 255, of a flat grey through yuv420p at a high quality


@pytest.fixture
def settings() -> Settings:
    return Settings(max_video_seconds=3, max_video_pixels=128 * 128)


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


def decoded(tmp_path: Path, content: bytes) -> Image.Image:
    (tmp_path / "raw").write_bytes(content)
    decode_image(tmp_path / "raw", tmp_path / "out.png", 10_000, "images", "image 1")
    image = Image.open(tmp_path / "out.png")
    image.load()
    return image


def encode(image: Image.Image, kind: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: show it turned clockwise
    image = decoded(tmp_path, encode(halves(), "PNG", exif=exif))
    assert (image.size, image.mode, image.format) == ((20, 40), "RGB", "PNG")
    assert (image.getpixel((10, 5)), image.getpixel((10, 35))) == (RED, GREEN)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = decoded(tmp_path, encode(halves().convert(mode), "PNG"))
    assert (image.size, image.mode) == ((40, 20), "RGB")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_shines_through_shows_white(tmp_path, kind):
    """And not the colour that happens to lie under it."""
    image = halves().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([[255] * 20 + [0] * 20], np.uint8), 20, axis=0)))
    flat = decoded(tmp_path, encode(image, kind, lossless=True))
    assert (flat.mode, flat.getpixel((5, 5)), flat.getpixel((35, 5))) == ("RGB", RED, (255, 255, 255))


def test_a_transparent_colour_of_a_palette_shows_white(tmp_path):
    palette = halves().quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    flat = decoded(tmp_path, encode(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert (flat.getpixel((5, 5)), flat.getpixel((35, 5))) == ((255, 255, 255), GREEN)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    deep = Image.fromarray(np.full((20, 40), 32768, dtype=np.uint16))
    assert decoded(tmp_path, encode(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "content",
    [
        picture("JPEG", (80, 60))[:-400],
        picture("PNG", (80, 60))[:200],
        picture("WEBP", (80, 60))[:60],
        picture("GIF"),
        b"not an image",
        picture("PNG", (200, 200)),
    ],
    ids=["torn jpeg", "torn png", "torn webp", "gif", "text", "too large"],
)
def test_what_cannot_be_decoded_is_refused_with_its_number(tmp_path, content):
    (tmp_path / "raw").write_bytes(content)
    with pytest.raises(BadInput, match="image 3 ") as error:
        decode_image(tmp_path / "raw", tmp_path / "out.png", 10_000, "images", "image 3")
    assert error.value.field == "images"


def video(path: Path, frames: int, *, kind: str = "mp4", size: int = 64, fps: int = 10) -> Path:
    """Flat greys: frame i has the brightness 40 + i × 4, modulo 256."""
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream("libx264" if kind != "webm" else "libvpx-vp9", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((size, size, 3), (40 + index * 4) % 256, dtype=np.uint8), "rgb24"
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("kind", "media_type"), [("mp4", "video/mp4"), ("mov", "video/mp4"), ("webm", "video/webm")])
def test_frames_are_taken_at_even_distances_with_both_ends(tmp_path, settings, kind, media_type):
    paths = sample_video(video(tmp_path / "v", 25, kind=kind), media_type, tmp_path, 4, settings)
    shades = [np.asarray(Image.open(path)).mean() for path in paths]
    assert shades == pytest.approx([40 + 4 * i for i in (0, 8, 16, 24)], abs=H264_ROUNDING)


@pytest.mark.parametrize(("frames", "views", "taken"), [(3, 8, 3), (1, 8, 1), (9, 1, 1), (9, 9, 9)])
def test_a_short_video_gives_what_it_has(tmp_path, settings, frames, views, taken):
    assert len(sample_video(video(tmp_path / "v.mp4", frames), "video/mp4", tmp_path, views, settings)) == taken


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda path: video(path, 40), "longer than 3 s"),
        (lambda path: video(path, 800, fps=1000), "longer than 3 s"),
        (lambda path: video(path, 3, size=256), "256 × 256"),
        (lambda path: path.write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 500), "decoded"),
        (lambda path: path.write_bytes(video(path, 20).read_bytes()[:300]), "decoded"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "decoded"),
        (lambda path: path.write_text("ffconcat version 1.0\nfile /etc/passwd\n"), "decoded"),
    ],
    ids=["too long", "too many frames", "too large", "no video inside", "torn", "a playlist", "a list of files"],
)
def test_a_video_that_cannot_be_used_is_refused(tmp_path, settings, make, hint):
    make(tmp_path / "v.mp4")
    with pytest.raises(BadInput, match=hint) as error:
        sample_video(tmp_path / "v.mp4", "video/mp4", tmp_path, 4, settings)
    assert error.value.field == "video"


def test_sound_without_pictures_is_refused(tmp_path, settings):
    with av.open(str(tmp_path / "v.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadInput, match="no pictures"):
        sample_video(tmp_path / "v.mp4", "video/mp4", tmp_path, 4, settings)


def test_a_phone_s_video_is_turned_as_it_was_held(tmp_path, settings):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_image(halves((96, 64)))))
        container.mux(stream.encode())
    image = Image.open(sample_video(path, "video/mp4", tmp_path, 1, settings)[0])
    assert image.size == (64, 96)
    left_goes_down = image.getpixel((32, 80))[0] > image.getpixel((32, 16))[0]
    assert left_goes_down  # turned by 90° against the clock, as the file says
