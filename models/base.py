"""What a family of generators promises to the offline stage and to the worker. Imports no torch: the words are free.

A *family* knows one architecture: where its checkpoints lie on disk, which of its layers may shrink, what to calibrate
it with. A *generator* is one loaded checkpoint or artifact of a family, warm, that turns inputs into files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Kind = Literal["video", "scene"]
OnStep = Callable[[int, int], None]  # (step done, of how many); raising from it ends the run at this step boundary


class BadInput(ValueError):
    """The inputs can never work with this generator, however often it tries. `field` is the request's name for it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


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
    facts: dict[str, float | int | str] = field(default_factory=dict)  # small numbers worth a log line: points, density


class Generator(Protocol):
    """One loaded model. Not thread-safe: a worker calls it from one thread at a time."""

    kind: Kind

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        """Generate and write the files into `folder`. Raises BadInput for inputs that can never work."""
        ...
