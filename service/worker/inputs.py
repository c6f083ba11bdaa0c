"""A task's uploads become what a generator takes: images, upright and in opaque RGB, as PNG files in the job's folder.

An upload is a stranger's file. Only the formats that the API let in are ever tried, sizes are checked before pixels are
decoded, and a video is opened as what it was taken for: ffmpeg would else follow a playlist to other files and hosts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.base import BadInput
from service.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_FRAMES_A_SECOND = 240
_BROKEN = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,  # Pillow's own errors are of this class
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
)


def decode_image(source: Path, target: Path, max_pixels: int, field: str, name: str) -> None:
    """Writes `source` to `target` as PNG, turned as its EXIF says; what shines through shows white.

    `field` and `name` are what a refusal calls it: images, image 3.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadInput(field, f"{name} has more than {max_pixels} pixels")
            _opaque(ImageOps.exif_transpose(image)).save(target, "PNG", compress_level=1)
    except BadInput:
        raise
    except _BROKEN as error:
        raise BadInput(field, f"{name} cannot be decoded: {error}") from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def sample_video(source: Path, media_type: str, folder: Path, views: int, settings: Settings) -> tuple[Path, ...]:
    """Up to `views` frames at even distances, the first and the last among them, as PNG files in `folder`."""
    import av  # with the worker's extra; the API never gets here

    try:
        # The container is the one whose signature the API saw, and nothing but this file is read.
        kind = "mp4" if media_type == "video/mp4" else "matroska"
        with av.open(str(source), format=kind, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise BadInput("video", "holds no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            count = _count(container, stream, settings)
            views = min(views, count)
            wanted = {round(i * (count - 1) / max(1, views - 1)) for i in range(views)}
            container.seek(0)
            paths: list[Path] = []
            for index, frame in enumerate(_frames(container, stream, settings)):
                if index in wanted:
                    path = folder / f"{len(paths):03d}.png"
                    frame.to_image().rotate(frame.rotation, expand=True).save(path, "PNG", compress_level=1)
                    paths.append(path)
                if len(paths) == len(wanted):
                    break
    except av.FFmpegError as error:
        raise BadInput("video", f"cannot be decoded: {error}") from error
    if not paths:
        raise BadInput("video", "holds no picture that can be decoded")
    return tuple(paths)


def _count(container: Any, stream: Any, settings: Settings) -> int:
    """Frames, counted without decoding one; a video that is too long is refused."""
    most = int(settings.max_video_seconds * MOST_FRAMES_A_SECOND)
    count, first, last = 0, None, None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            last = packet.pts if last is None else max(last, packet.pts)
        seconds = float((last - first) * stream.time_base) if first is not None and last is not None else 0.0
        if seconds > settings.max_video_seconds or count > most:
            raise BadInput("video", f"is longer than {settings.max_video_seconds:g} s")
    return count


def _frames(container: Any, stream: Any, settings: Settings) -> Iterator[Any]:
    _check_pixels(stream.codec_context.width, stream.codec_context.height, settings)
    for frame in container.decode(stream):
        _check_pixels(frame.width, frame.height, settings)  # it may change from one to the next
        yield frame


def _check_pixels(width: int, height: int, settings: Settings) -> None:
    if width * height > settings.max_video_pixels:
        raise BadInput("video", f"has {width} × {height} pixels; at most {settings.max_video_pixels} are taken")
