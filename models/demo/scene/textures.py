"""The photographs that cover the demo scenes: a sheet of tiles, and the pyramid that the renderer reads.

The sheet `textures.jpg` is made from scikit-image's sample pictures and lies beside this file, so that training needs
no scikit-image. To make it again: `python -m models.demo.scene.textures`. All of them are free of copyright, by their
docstrings in `skimage.data`:

    astronaut, hubble_deep_field  NASA, public domain          rocket                  SpaceX, public domain
    brick, grass, gravel          CC0Textures, CC0             retina                  Wikimedia Commons, CC0
    camera                        Lav Varshney, CC0            chelsea                 Stefan van der Walt, CC0
    coffee                        Rachel Michetti, CC0         immunohistochemistry    no known copyright restrictions

models/demo/photographs has larger crops of some of the same; the shipped weights were trained on these tiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAMES = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "grass",
    "gravel", "hubble_deep_field", "immunohistochemistry", "retina", "rocket",
)  # fmt: skip
TILE = 96  # pixels on a side
LEVELS = 5  # 96, 48, 24, 12, 6
SHEET = Path(__file__).with_name("textures.jpg")


def load(sheet: Path = SHEET) -> Tensor:
    """The tiles as a pyramid, float32 [tiles, 96² + 48² + 24² + 12² + 6², 3] in 0..1, the finest level first.

    The tiles of the sheet have one mean (0.5) and one contrast, so that a tile modulates a colour without darkening it.
    """
    pixels = torch.from_numpy(np.asarray(Image.open(sheet).convert("RGB")).copy()).permute(2, 0, 1) / 255.0
    tiles = torch.stack(pixels.split(TILE, dim=2)[: len(NAMES)])  # [tiles, 3, 96, 96]
    levels = [torch.nn.functional.avg_pool2d(tiles, 2**level) for level in range(LEVELS)]
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1).contiguous()


def main() -> None:
    from skimage import data

    sheet = Image.new("RGB", (TILE * len(NAMES), TILE))
    for index, name in enumerate(NAMES):
        picture = Image.fromarray(getattr(data, name)()).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        tile = picture.crop((left, top, left + side, top + side)).resize((TILE, TILE), Image.Resampling.BOX)
        values = np.asarray(tile, dtype=np.float64)
        values = (values - values.mean()) * (56 / values.std()) + 128  # one brightness and one contrast for all
        sheet.paste(Image.fromarray(values.clip(0, 255).round().astype(np.uint8)), (TILE * index, 0))
    sheet.save(SHEET, quality=92, subsampling=0)
    print(f"{SHEET}: {len(NAMES)} tiles, {SHEET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
