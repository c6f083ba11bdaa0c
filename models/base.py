"""What a family of generators promises to the offline stage and to the worker. Imports no torch: the words are free.

A *family* knows one architecture: what its checkpoints look like on disk, how to load and write them. A *model* is one
loaded checkpoint or artifact: which of its layers may shrink, what to calibrate it with, how its output is judged. To a
worker it is a *generator*, warm, that turns inputs into files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quant_runtime.artifact import Manifest
    from quant_runtime.attention import AttentionPlan, AttentionState
    from quant_runtime.selftest import Piece

Kind = Literal["video", "scene"]
OnStep = Callable[[int, int], None]  # (step done, of how many); raising from it ends the run at this step boundary


class BadInput(ValueError):
    """The inputs can never work with this generator, however often it tries. `field` is the request's name for it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NoRoom(ValueError):
    """These inputs can work with this generator, and at this moment there is too little memory for them."""


@dataclass(frozen=True)
class VideoLimits:
    """What a video generator takes, and what it takes for a field that a request leaves out."""

    size_multiple: int  # width and height are multiples of it
    max_pixels: int  # of one frame
    max_side: int
    max_frames: int
    frames_step: int = 4  # frames = frames_step * n + 1: the temporal stride of a causal VAE
    max_steps: int = 100
    max_prompt: int = 2000  # characters
    width: int = 320  # the defaults, all of them inside the limits
    height: int = 192
    frames: int = 33
    fps: int = 16
    steps: int = 20
    guidance: float = 5.0
    image: Literal["none", "optional", "required"] = "none"  # a picture to start from: never, if given, always


@dataclass(frozen=True)
class SceneLimits:
    """What a reconstruction generator takes."""

    min_views: int = 1
    max_views: int = 8
    formats: tuple[str, ...] = ("glb", "ply", "cameras", "depth")


@dataclass(frozen=True)
class VideoInputs:
    prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    seed: int
    negative_prompt: str = ""
    image: Path | None = None  # the picture to start from, upright; decoded and checked by the caller; any size


@dataclass(frozen=True)
class SceneInputs:
    images: tuple[Path, ...]  # decoded and checked by the caller; any size; the first is the reference view
    formats: tuple[str, ...] = ("glb", "ply", "cameras", "depth")


@dataclass(frozen=True)
class OutputFile:
    """A finished file in the folder that the caller gave. `name` is its name in the job's results."""

    name: str
    media_type: str
    path: Path


@dataclass(frozen=True)
class Outputs:
    files: tuple[OutputFile, ...]
    cached: Mapping[str, int] = field(default_factory=dict)  # at most, in bytes, by where it lay: device or host


class Generator(Protocol):
    """One loaded model, as a worker sees it. Not thread-safe: called from one thread at a time."""

    kind: Kind

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        """Generate and write the files into `folder`.

        Raises BadInput for inputs that can never work, and NoRoom for those that another moment may have memory for.
        """
        ...


class Model(Generator, Protocol):
    """One loaded model, as the offline stage sees it."""

    kernels: dict[str, str]  # which arithmetic runs on this machine, in words
    network: nn.Module  # whose linear layers shrink
    attention: AttentionState  # how its self-attention runs, and what density it ran at

    def layers(self) -> list[str]:
        """Names, inside `network`, of the linear layers to compress."""
        ...

    def shared(self) -> list[Sequence[str]]:
        """Groups of those that are fed the same tensor: a method treats a group's input alike."""
        ...

    def attend(self, plan: AttentionPlan) -> None:
        """From now on self-attention runs by this plan. Refuses what `Family.suits` does."""
        ...

    def calibrate(self, samples: int, on_sample: OnStep) -> None:
        """Run the network on this many of the family's named calibration samples."""
        ...

    def outputs(self, samples: int, on_sample: OnStep) -> list[torch.Tensor]:
        """What it makes of this many of the family's named held-out samples, in the form that Family.score compares."""
        ...

    def limits(self) -> VideoLimits | SceneLimits:
        """What requests it takes."""
        ...


class Family(Protocol):
    """One architecture. Stateless; FAMILIES in models/registry.py holds one of each."""

    name: str
    kind: Kind
    component: str  # the folder inside a checkpoint that holds the network's weights; "" is the checkpoint itself
    originals: Sequence[tuple[str, str]]  # what its authors call the network's layers, as models/lora.py reads it

    def components(self, folder: Path) -> tuple[str, ...]:
        """That folder, or those of a checkpoint with networks that take turns. Reads configs alone."""
        ...

    def recognizes(self, folder: Path) -> bool:
        """Is this folder a checkpoint of mine? Reads configs alone."""
        ...

    def load(self, folder: Path, device: str, dtype: torch.dtype) -> Model:
        """A checkpoint in full precision. Raises ValueError naming the file or key that does not fit."""
        ...

    def open(self, folder: Path, manifest: Manifest, device: str, check: bool = False) -> Model:
        """An artifact, ready to run: kernels chosen, projections fused.

        All files have been verified, or, where it is to `check`, all but the weights in the folders that are `hashed`
        here: by the reading that loads them. ValueError names the file or key that does not fit.
        """
        ...

    def hashed(self, folder: Path) -> tuple[str, ...]:
        """The folders inside an artifact whose weights `open` checks as it reads them. Reads configs alone."""
        ...

    def suits(self, network: nn.Module, plan: AttentionPlan) -> None:
        """Raises ValueError for a plan that this network, perhaps on the meta device, cannot run by: it says why."""
        ...

    def pieces(self, folder: Path, manifest: Manifest, device: str) -> Iterable[Piece]:
        """Small parts of what an artifact runs on this device, for the self-test. Reads configs alone."""
        ...

    def write(self, model: Model, source: Path, target: Path) -> None:
        """The artifact's files, its manifest left out: the network as it is now, the rest linked from `source`."""
        ...

    def score(self, outputs: Sequence[torch.Tensor], full: Sequence[torch.Tensor]) -> dict[str, float]:
        """How close outputs are to those of the same samples in full precision, and to the truth where there is one."""
        ...

    def tiny(self, folder: Path) -> None:
        """Write a checkpoint with random weights and the real layout, small enough for a test."""
        ...
