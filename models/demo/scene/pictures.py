"""Pictures of a held-out scene, as somebody with a camera would bring them: `write` renders them into a folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from models.demo.scene import render, scenes, textures


def write(folder: Path, views: int, size: int = 224, seed: int = 0, index: int = 0) -> list[Path]:
    """`views` PNG files of size x size, in order; the same seed and index give the same ones."""
    drawn = scenes.draw(scenes.generator("held-out", seed, index), 1, views)
    images = render.render(drawn, size, textures.load()).images[0]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(images.clamp(0, 1)):
        paths.append(folder / f"view-{number}.png")
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(paths[-1])
    return paths
