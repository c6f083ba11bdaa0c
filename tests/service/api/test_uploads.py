"""Whatever the bytes, looking at an upload ends in a media type or in a refusal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.uploads import SUFFIX, RefusedError, image_type, video_type
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
