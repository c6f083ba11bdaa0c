"""Frames become files: an H.264 film that any browser plays, and a poster."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

CRF = 16  # x264's constant quality: visually lossless at these sizes
# With its macroblock tree x264 answers the same frames differently now and then, one of some 25 tiny films: a job that
# is done again is to give the same film. It spends bits by what later frames take over, which CRF 16 has to spare.
ALIKE = "mbtree=0"


def write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    """uint8 [T, H, W, 3], H and W even (4:2:0 colour has half of each), as yuv420p with its index in front."""
    t, height, width, channels = frames.shape
    if frames.dtype != np.uint8 or channels != 3 or height % 2 or width % 2 or not t:
        raise ValueError(f"a film takes uint8 [T, even, even, 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": str(CRF), "preset": "veryfast", "x264-params": ALIKE}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.color_primaries = stream.codec_context.color_trc = stream.codec_context.colorspace = 1
        for picture in frames:
            # BT.709 said and done: players assume it for no size in particular, and a mismatch shifts every colour
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3], every frame."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def write_poster(frames: np.ndarray, path: Path) -> None:
    """The middle frame as a JPEG."""
    Image.fromarray(frames[len(frames) // 2]).save(path, quality=90)


def contact_sheet(rows: list[np.ndarray], columns: int = 6, gap: int = 4) -> Image.Image:
    """Films one above another, `columns` evenly spaced frames of each. All uint8 [T, H, W, 3] of one H and W."""
    strips = []
    for film in rows:
        picks = np.linspace(0, len(film) - 1, columns).round().astype(int)
        pictures = [np.pad(film[i], ((0, 0), (0, gap), (0, 0)), constant_values=255) for i in picks]
        strips.append(
            np.pad(np.concatenate(pictures, axis=1)[:, :-gap], ((0, gap), (0, 0), (0, 0)), constant_values=255)
        )
    return Image.fromarray(np.concatenate(strips, axis=0)[:-gap])
