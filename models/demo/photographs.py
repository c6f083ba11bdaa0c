"""The photographs behind the demo models' data: eight of scikit-image's samples, shrunk, in `photographs/`.

All are CC0 or public domain: bricks and gravel (CC0Textures), the cat (Stefan van der Walt), coffee (Rachel Michetti,
Pikolo Espresso Bar), the rocket (SpaceX), the moon, galaxies and the astronaut (NASA).
`python -m models.demo.photographs` writes the folder again from an installed scikit-image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

FOLDER = Path(__file__).with_name("photographs")
HEIGHT, WIDTH = 288, 448  # half again as large as a clip, so that a camera has somewhere to go

# name in a caption: sample in scikit-image
SAMPLES = {
    "an astronaut": "astronaut",
    "bricks": "brick",
    "a cat": "chelsea",
    "coffee": "coffee",
    "galaxies": "hubble_deep_field",
    "gravel": "gravel",
    "the moon": "moon",
    "a rocket": "rocket",
}


def load() -> Tensor:
    """uint8 [8, 3, 288, 448], in the order of SAMPLES."""
    pictures = [np.asarray(Image.open(FOLDER / f"{name}.jpg").convert("RGB")) for name in SAMPLES.values()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def write() -> None:
    from skimage import data

    FOLDER.mkdir(exist_ok=True)
    for sample in SAMPLES.values():
        picture = Image.fromarray(getattr(data, sample)()).convert("RGB")
        scale = max(WIDTH / picture.width, HEIGHT / picture.height)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        left, top = (picture.width - WIDTH) // 2, (picture.height - HEIGHT) // 2
        if sample == "astronaut":
            top = 0  # her face is in the upper half
        picture = picture.crop((left, top, left + WIDTH, top + HEIGHT))
        # Out of focus, as a background is: finer grain than this is lost in 8x8 latents and would teach only blur.
        picture = picture.filter(ImageFilter.GaussianBlur(1.5))
        picture.save(FOLDER / f"{sample}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    write()
