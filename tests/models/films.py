"""What the tests of several video families ask for, and how they compare what came back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models import compress, start_image
from models.base import VideoInputs
from models.cogvideox import CogVideoX
from models.compress import Recipe
from models.hunyuan_video import HunyuanVideo
from models.video import PipelineFamily
from models.wan import Wan
from quant_runtime import artifact
from quant_runtime.artifact import Manifest
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import QuaRot, Rtn, SmoothQuant
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP

SPARSE = {
    "topp": AttentionPlan(TopP(0.5, 0.0, block=16)),
    "bands": AttentionPlan(Bands(0.5, block=16, first_frame=True)),
    "tiles": AttentionPlan(Tiles(0.5, block=16)),
}
FLOAT32 = 1e-5  # of the size of the answer: the same sums in another order, some layers deep
ROUNDING = 1  # step of 8 bits: two answers that are one to float32 may be rounded to neighbours
RECIPES = {
    "w8a8": Recipe(Rtn(), QuantFormat.parse("w8a8")),
    "w4a8": Recipe(QuaRot(), QuantFormat.parse("w4a8"), judging_samples=0),
    "w4a6": Recipe(SmoothQuant(), QuantFormat.parse("w4a6"), judging_samples=0),
    "w3a6": Recipe(Rtn(), QuantFormat.parse("w3a6"), judging_samples=0),
    "w4a4": Recipe(QuaRot(), QuantFormat.parse("w4a4"), judging_samples=0),
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
    made = pipe(**(size | asked), generator=torch.Generator().manual_seed(1), output_type="np").frames[0]
    return (made * 255).round().astype(np.uint8)


def another(checkpoint: Path) -> Path:
    """A picture like the checkpoint's, upside down."""
    path = checkpoint.parent / "another.png"
    with Image.open(checkpoint / "start.png") as picture:
        picture.rotate(180).save(path)
    return path


def changed(checkpoint: Path, folder: Path, file: str, **fields: Any) -> Path:
    """A copy of a checkpoint in `folder`, one of whose JSON files has other fields."""
    artifact.link_or_copy(checkpoint, folder)
    given = json.loads((folder / file).read_bytes())
    (folder / file).unlink()  # and not written over: it is the checkpoint's own
    (folder / file).write_text(json.dumps(given | fields))
    return folder


@contextmanager
def answers(*networks: nn.Module) -> Iterator[list[Tensor]]:
    """What the networks answer, call by call, which of them it was in front: filled as long as it is open."""
    heard: list[Tensor] = []

    def hear(number: int) -> Any:
        return lambda _, inputs, output: heard.append(torch.cat([torch.tensor([float(number)]), output[0].flatten()]))

    hooks = [network.register_forward_hook(hear(number)) for number, network in enumerate(networks)]
    yield heard
    for hook in hooks:
        hook.remove()


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two films, in steps of 8 bits."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint that is run: its family, how to film with its tiny one, and how diffusers does."""

    family: PipelineFamily[Any]
    pipeline: str  # diffusers' class
    asked: Mapping[str, Any]  # of that, for guidance of 2
    kind: str = ""  # of Wan's
    size: Mapping[str, int] = field(default_factory=lambda: {"width": 48, "height": 32})
    image: bool = False  # starts from the checkpoint's picture

    def tiny(self, folder: Path) -> None:
        if self.kind:
            self.family.tiny(folder, self.kind)
        else:
            self.family.tiny(folder)

    def inputs(self, checkpoint: Path, **change: Any) -> VideoInputs:
        """Of three steps: what guided one shows in the answers of the next, of two experts the second's too."""
        return inputs(**self.size | {"steps": 3} | ({"image": checkpoint / "start.png"} if self.image else {}) | change)

    def stock(self, checkpoint: Path) -> tuple[list[Tensor], np.ndarray]:
        """By diffusers' own pipeline, without a processor of ours: its networks' answers, and the film of `inputs`."""
        pipe = getattr(diffusers, self.pipeline).from_pretrained(checkpoint, dtype=torch.float32)
        with answers(*(getattr(pipe, name) for name in self.family.components(checkpoint))) as heard:
            film = self._stock_film(checkpoint, pipe)
        return heard, film

    def _stock_film(self, checkpoint: Path, pipe: Any) -> np.ndarray:
        image = {"image": start_image.fitted(checkpoint / "start.png", **self.size)} if self.image else {}
        return stock(pipe, **self.asked, **self.size, **image, num_inference_steps=3)


_WAN: dict[str, Any] = {"negative_prompt": "", "guidance_scale": 2.0, "max_sequence_length": 64}
_96X64, _128X96 = {"width": 96, "height": 64}, {"width": 128, "height": 96}
CASES = {
    "wan-t2v": Case(Wan(), "WanPipeline", _WAN, "t2v", _96X64),
    "wan-i2v": Case(
        Wan(), "WanImageToVideoPipeline", _WAN | {"max_sequence_length": 512}, "i2v", _96X64, image=True
    ),
    "wan-t2v-a14b": Case(Wan(), "WanPipeline", _WAN | {"guidance_scale_2": 1.5}, "t2v-a14b", _96X64),
    "wan-i2v-a14b": Case(Wan(), "WanImageToVideoPipeline", _WAN, "i2v-a14b", _96X64, image=True),
    "wan-ti2v-5b": Case(Wan(), "WanPipeline", _WAN, "ti2v-5b", _128X96),
    "wan-ti2v-5b-image": Case(Wan(), "WanImageToVideoPipeline", _WAN, "ti2v-5b", _128X96, image=True),
    "hunyuan_video": Case(
        HunyuanVideo(), "HunyuanVideoPipeline", {"guidance_scale": 2.0, "max_sequence_length": 128}
    ),
    "cogvideox": Case(CogVideoX(), "CogVideoXPipeline", _WAN | {"max_sequence_length": 40}),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """An artifact, and what the compressed model filmed before it was saved."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    before: np.ndarray


def made(
    family: PipelineFamily[Any], checkpoint: Path, recipe: Recipe, out: Path, asked: VideoInputs | None = None
) -> Made:
    films = []

    class Filmed(type(family)):
        def write(self, model: Any, source: Path, target: Path) -> None:
            model.attend(recipe.attention)
            films.append(model.film(asked or inputs(), nothing).frames)
            super().write(model, source, target)

    manifest = compress.compress(
        Filmed(), checkpoint, recipe, out, base="tiny", device="cpu", on_progress=lambda stage, done, of: None
    )
    return Made(out, manifest, recipe, films[0])
