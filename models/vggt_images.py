"""Pictures to what VGGT takes, and cameras back to the pictures.

The rules are the published loaders' (arXiv:2503.11651's code, with the side 518; here any multiple of the patch size):

    crop  width becomes `side`, height follows and is rounded to the patch; what is higher than `side` loses rows at
          the top and at the bottom. Landscape pictures are shown whole.
    pad   the longer side becomes `side`, the other follows, rounded, and white fills up the square.

Rounding scales the two axes a little differently. Pictures that end with different heights are padded with white, in
the middle of the largest. Pixel centres are integers: a picture's left edge is at -0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Framing = Literal["crop", "pad"]


@dataclass(frozen=True)
class Placement:
    """Where a picture of width x height pixels lies in what the network sees.

    It is resized to scaled_width x scaled_height and put with its left upper corner at (left, top), which may lie
    outside; all that lies outside is cut off.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int

    def to_picture(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] in the network's pixels to the same camera's in the picture's."""
        across, down = self.width / self.scaled_width, self.height / self.scaled_height
        back = intrinsics.new_tensor(
            [
                [across, 0, (0.5 - self.left) * across - 0.5],
                [0, down, (0.5 - self.top) * down - 0.5],
                [0, 0, 1],
            ]
        )
        return back @ intrinsics

    def visible(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the network's picture of (height, width) that show the picture, not padding."""
        return (
            slice(max(self.top, 0), min(self.top + self.scaled_height, size[0])),
            slice(max(self.left, 0), min(self.left + self.scaled_width, size[1])),
        )


def place(width: int, height: int, side: int, patch: int, framing: Framing) -> Placement:
    """Where a picture of this size goes, ahead of the padding that makes it as high as the others.

    Refuses a picture that is so long that nothing is left of its other side.
    """
    longer = width if framing == "crop" else max(width, height)
    scaled_width, scaled_height = (round(length * side / longer / patch) * patch for length in (width, height))
    if not scaled_width or not scaled_height:
        raise ValueError(f"a picture of {width}x{height} is too long: at {side}, its other side is less than a patch")
    left = (side - scaled_width) // 2
    top = (side - scaled_height) // 2 if framing == "pad" else -(max(scaled_height - side, 0) // 2)
    return Placement(width, height, scaled_width, scaled_height, left, top)


def load(paths: Sequence[Path], side: int, patch: int, framing: Framing) -> tuple[Tensor, list[Placement]]:
    """Pictures, turned upright by whoever saved them, to float32 [S, 3, H, W] in 0..1 and where each of them lies.

    H and W are multiples of `patch`, at most `side`. What is transparent lies on white.
    """
    pictures = [opened(path) for path in paths]
    placements = [place(picture.width, picture.height, side, patch, framing) for picture in pictures]
    height = side if framing == "pad" else max(min(where.scaled_height, side) for where in placements)
    views = np.full((len(pictures), height, side, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        where = placements[index]
        if framing == "crop":
            room = (height - min(where.scaled_height, side)) // 2
            where = placements[index] = replace(where, top=where.top + room)
        views[index][where.visible((height, side))] = resized(picture, where, (height, side))
    return torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255, placements


def resized(picture: Image.Image, where: Placement, size: tuple[int, int]) -> np.ndarray:
    """What is seen of a picture, at its new size, uint8 [rows, columns, 3]. What is cut off is never computed."""
    rows, columns = where.visible(size)
    across, down = where.width / where.scaled_width, where.height / where.scaled_height
    box = (
        (columns.start - where.left) * across,
        (rows.start - where.top) * down,
        (columns.stop - where.left) * across,
        (rows.stop - where.top) * down,
    )
    seen = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(picture.resize(seen, Image.Resampling.BICUBIC, box=box))


def opened(path: Path) -> Image.Image:
    """Any of Pillow's modes as RGB; what is transparent lies on white, and 16 bits of grey become 8."""
    with Image.open(path) as picture:
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            rgba = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        if picture.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
        return picture.convert("RGB")
