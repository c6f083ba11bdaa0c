"""What the tests of several video families ask for, and how they compare what came back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import compress
from models.base import VideoInputs
from models.compress import Recipe
from models.video import PipelineFamily
from quant_runtime.artifact import Manifest
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import QuaRot, Rtn
from quant_runtime.sparsity.topk import TopK

RECIPES = {
    "w8a8": Recipe(Rtn(), QuantFormat.parse("w8a8")),
    "w4a8": Recipe(QuaRot(), QuantFormat.parse("w4a8"), judging_samples=0),
    "sparse": Recipe(Rtn(), QuantFormat.parse("w8a8"), AttentionPlan(TopK(0.75, block=16)), judging_samples=0),
}


def inputs(**change: Any) -> VideoInputs:
    asked = {"prompt": "a red ball", "width": 48, "height": 32, "frames": 9, "fps": 8, "steps": 2, "guidance": 2.0}
    return VideoInputs(**(asked | {"seed": 1} | change))


def nothing(done: int, of: int) -> None:
    pass


def stock(pipe: Any, **asked: Any) -> np.ndarray:
    """The film of `inputs()` by diffusers' own pipeline: uint8 [T, H, W, 3]."""
    pipe.set_progress_bar_config(disable=True)
    size = {"prompt": "a red ball", "width": 48, "height": 32, "num_frames": 9, "num_inference_steps": 2}
    made = pipe(**size, **asked, generator=torch.Generator().manual_seed(1), output_type="np").frames[0]
    return (made * 255).round().astype(np.uint8)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two films, in steps of 8 bits."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@dataclass(frozen=True)
class Made:
    """An artifact, and what the compressed model filmed before it was saved."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    before: np.ndarray


def made(family: PipelineFamily[Any], checkpoint: Path, recipe: Recipe, out: Path) -> Made:
    films = []

    class Filmed(type(family)):
        def write(self, model: Any, source: Path, target: Path) -> None:
            model.attend(recipe.attention)
            films.append(model.film(inputs(), nothing).frames)
            super().write(model, source, target)

    manifest = compress.compress(
        Filmed(), checkpoint, recipe, out, base="tiny", device="cpu", on_progress=lambda stage, done, of: None
    )
    return Made(out, manifest, recipe, films[0])
