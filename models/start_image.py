"""Pictures that films start from: one is brought to a film's size, and some that come along for calibration."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from models.base import BadInput
from models.demo import photographs

# What a model that films on from a picture is calibrated and judged with where its checkpoint names no pictures. No
# published folder has any: to take the demo's photographs is our choice.
CALIBRATION = (
    ("A ginger cat turns its head towards the camera and blinks", "chelsea"),
    ("A rocket lifts off its launch pad, clouds of smoke spread over the ground", "rocket"),
    ("The camera glides over gravel, pebbles pass by below", "gravel"),
    ("A spoon stirs a cup of coffee on a wooden table, steam rises", "coffee"),
)
JUDGING = (
    ("An astronaut in an orange suit smiles and nods in front of a flag", "astronaut"),
    ("The camera moves along a brick wall, the light of the evening wanders", "brick"),
    ("The moon turns slowly in front of a black sky", "moon"),
    ("The camera flies through a field of galaxies, stars pass by", "hubble_deep_field"),
)


def shipped(name: str) -> Path:
    """A photograph that comes along, by its sample's name."""
    return photographs.FOLDER / f"{name}.jpg"


def fitted(path: Path, width: int, height: int) -> Image.Image:
    """The picture as RGB of this size: its middle, of the film's shape, scaled (bicubic).

    A picture of the film's own shape is only scaled, as in the example of diffusers' WanImageToVideoPipeline, which
    gives a film its picture's shape; another is cut as Wan 2.2's own program does (textimage2video.py), not squeezed.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise BadInput("image", f"image cannot be read: {error}") from error
    # Cut first: of a picture one pixel wide, all that covers a film would be as large as a memory.
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
