"""A generator with no model in it: it takes its steps, obeys its prompt, and writes bytes that follow from its inputs.

`python -m tests.service.worker.toy` is a worker process that runs it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from models.base import BadInput, Kind, OnStep, OutputFile, Outputs, SceneInputs, VideoInputs
from service.jobs import SelfTest

STEP_SECONDS = 0.02


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def film_of(prompt: str, seed: int, steps: int) -> bytes:
    return hashlib.sha256(f"{prompt} {seed} {steps}".encode()).digest() * 100


@dataclass
class Toy:
    kind: Kind
    kernels: dict[str, str] = field(default_factory=lambda: {"int8": "toy"})

    def run(self, inputs: VideoInputs | SceneInputs, folder: Path, on_step: OnStep) -> Outputs:
        assert threading.current_thread().name == "model"
        if isinstance(inputs, SceneInputs):
            on_step(1, 1)
            sizes = [np.asarray(Image.open(path)).shape[1::-1] for path in inputs.images]
            (folder / "cameras.json").write_text(json.dumps(sizes))
            return Outputs((OutputFile("cameras.json", "application/json", folder / "cameras.json"),))
        for step in range(inputs.steps):
            time.sleep(STEP_SECONDS)
            if step == 2:
                _misbehave(inputs.prompt)
            on_step(step + 1, inputs.steps)
        (folder / "video.mp4").write_bytes(film_of(inputs.prompt, inputs.seed, inputs.steps))
        files = [OutputFile("video.mp4", "video/mp4", folder / "video.mp4")]
        if inputs.image is not None:  # shown as it was seen
            shutil.copyfile(inputs.image, folder / "start.png")
            files.append(OutputFile("start.png", "image/png", folder / "start.png"))
        return Outputs(tuple(files))


def _misbehave(prompt: str) -> None:
    match prompt:
        case "refuse":
            raise BadInput("prompt", "this can never be drawn")
        case "break":
            raise ZeroDivisionError("in the middle of it")
        case "too large":
            raise OutOfMemoryError("no memory for that")
        case "lose the device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "hang":
            time.sleep(3600)


def load(path: Path, device: str) -> Toy:
    assert device == "cpu"
    return Toy(json.loads((path / "manifest.json").read_text())["serving"]["kind"])


def test(path: Path, device: str, fallback: bool) -> SelfTest:
    return SelfTest(verdict="passed", device=device, versions={"toy": "Python"}, seconds=0.25)


if __name__ == "__main__":
    from service import logs
    from service.settings import from_environment
    from service.worker.main import work

    logs.configure("info")
    work(from_environment(), load, test, with_parent=True)
