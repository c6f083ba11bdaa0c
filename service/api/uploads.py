"""What can be told of a file from its first bytes, without decoding it: that is the worker's business."""

from __future__ import annotations

import binascii
import re
import struct
from tempfile import SpooledTemporaryFile
from typing import IO

from PIL import Image, UnidentifiedImageError

SMALLEST_SIDE = 16
_IMAGES = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where the process turns warnings into errors
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
)

_DATA_URI = re.compile(r"data:image/(jpeg|png|webp);base64,", re.IGNORECASE)

SUFFIX = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp", "video/mp4": "mp4", "video/webm": "webm"}


class RefusedError(ValueError):
    """Says what the file is, and what would have done."""


def spooled(in_memory: int) -> IO[bytes]:
    """A file that is in memory until it has more bytes than that, then on the disk. Closing it removes it."""
    return SpooledTemporaryFile(in_memory)


def image_type(file: IO[bytes], max_pixels: int) -> str:
    """The media type of a JPEG, PNG or WebP image. Its size is what its header states; no pixel is decoded.

    A JPEG with further pictures inside (MPO, as phones write them) is taken as its first picture.
    """
    if not file.read(1):
        raise RefusedError("is empty")
    file.seek(0)
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:  # MPO is found as JPEG
            kind, (width, height) = image.format or "", image.size
            animated = kind != "MPO" and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RefusedError(f"has more than {max_pixels} pixels") from error
    except _BROKEN as error:
        raise RefusedError("is not a JPEG, PNG or WebP image") from error
    finally:
        file.seek(0)
    if width * height > max_pixels:
        raise RefusedError(f"has {width} × {height} pixels; at most {max_pixels} are taken")
    if min(width, height) < SMALLEST_SIDE:
        raise RefusedError(f"has {width} × {height} pixels; each side needs {SMALLEST_SIDE}")
    if animated:
        raise RefusedError("is animated; send its frames as images, or a video")
    return _IMAGES[kind]


def video_type(file: IO[bytes]) -> str:
    """video/mp4 (also QuickTime) or video/webm (also Matroska), by the container's signature."""
    head = file.read(12)
    file.seek(0)
    if head[4:8] == b"ftyp":
        return "video/mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "video/webm"
    raise RefusedError("is empty" if not head else "is not an MP4, MOV, WebM or Matroska video")


def data_uri(text: str, max_bytes: int) -> bytes:
    """The file inside a data URI. What kind it really is, image_type says."""
    head = _DATA_URI.match(text)
    if head is None:
        raise RefusedError("is a data URI of another kind than data:image/jpeg;base64, (or png, or webp)")
    size = (len(text) - head.end()) // 4 * 3 - text.count("=", -2)
    if size > max_bytes:
        raise RefusedError(f"has {size} bytes; at most {max_bytes} are taken")
    try:
        return binascii.a2b_base64(text[head.end() :], strict_mode=True)
    except ValueError as error:
        raise RefusedError(f"is not in base64: {error}") from error
