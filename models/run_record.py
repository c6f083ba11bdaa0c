"""`run.json`, a result file beside the others: what was asked, on what arithmetic it ran, where the time went."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from models.base import Model, OutputFile, SceneInputs, VideoInputs
from quant_runtime.artifact import AttentionRecord

NAME = "run.json"


class Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What went by since the last lap, or since the clock was made, was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now


def write(
    folder: Path, inputs: VideoInputs | SceneInputs, model: Model, seconds: dict[str, float], **facts: object
) -> OutputFile:
    """Write it into `folder`. `seconds` are wall-clock, by stage; `facts` stand beside them under their own names."""
    asked = asdict(inputs)
    if isinstance(inputs, SceneInputs):
        asked["images"] = [path.name for path in inputs.images]
    elif inputs.image is not None:
        asked["image"] = inputs.image.name
    record = {
        "inputs": asked,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "attention": AttentionRecord.of(model.attention.plan, model.attention.density()).model_dump(),
        "kernels": model.kernels,
        **facts,
    }
    path = folder / NAME
    path.write_text(json.dumps(record, indent=1) + "\n")
    return OutputFile(NAME, "application/json", path)
