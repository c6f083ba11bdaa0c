"""Whatever the bytes, looking at an upload ends in a media type or in a refusal."""

from __future__ import annotations

import base64
import io
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.uploads import SUFFIX, RefusedError, data_uri, image_type, spooled, video_type
from tests.service.support import picture

REAL = [picture(kind, (48, 32)) for kind in ("PNG", "JPEG", "WEBP")]
HEADS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8X", b"GIF89a", b"II*\0", b"BM"]
HEADED = st.builds(bytes.__add__, st.sampled_from(HEADS), st.binary(max_size=80))


@st.composite
def damaged(draw) -> bytes:
    """A real picture with a few bytes changed and perhaps its end torn off."""
    content = bytearray(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))])


def look(content: bytes, how) -> str:
    file = io.BytesIO(content)
    try:
        return how(file)
    except RefusedError as error:
        return str(error)
    finally:
        assert file.tell() == 0


@settings(max_examples=300)
@given(st.one_of(damaged(), st.binary(max_size=200), HEADED))
def test_any_bytes_are_typed_or_refused(content):
    for how in (lambda file: image_type(file, 10_000), video_type):
        answer = look(content, how)
        assert answer in SUFFIX or answer.startswith(("is ", "has "))


@pytest.mark.parametrize("content", REAL)
def test_real_pictures_are_taken(content):
    assert image_type(io.BytesIO(content), 48 * 32).startswith("image/")
    with pytest.raises(RefusedError, match="at most 1535"):
        image_type(io.BytesIO(content), 48 * 32 - 1)


@given(st.binary(max_size=300), st.sampled_from(["image/png", "image/jpeg", "IMAGE/WebP"]), st.integers(0, 300))
def test_a_data_uri_is_its_content_or_too_large(content, kind, most):
    text = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    if len(content) <= most:
        assert data_uri(text, most) == content
        return
    with pytest.raises(RefusedError, match=f"has {len(content)} bytes; at most {most}"):
        data_uri(text, most)


@given(st.one_of(st.text(max_size=100), st.text(max_size=100).map("data:image/png;base64,".__add__)))
def test_any_text_is_a_data_uri_or_refused(text):
    with suppress(RefusedError):
        assert isinstance(data_uri(text, 1000), bytes)


def test_a_spooled_file_goes_to_the_disk_as_it_grows():
    with spooled(10) as file:
        file.write(b"x" * 10)
        assert isinstance(file._file, io.BytesIO)
        file.write(b"x")
        assert file.fileno() > 0
