"""A checkpoint goes in, an artifact comes out: observe, convert, write aside, open what was written, judge it, rename."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from models.base import Family, Model
from quant_runtime import artifact
from quant_runtime.artifact import AttentionRecord, Base, Manifest
from quant_runtime.attention import AttentionPlan
from quant_runtime.calibrate import fingerprint, observe
from quant_runtime.convert import convert
from quant_runtime.formats import W16A16, QuantFormat
from quant_runtime.methods import Method, Rtn

OnProgress = Callable[[str, int, int], None]  # (what is being done, how much of it, of how much)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is compressed. A value: what it says is written into the manifest."""

    method: Method = field(default_factory=Rtn)
    format: QuantFormat = W16A16
    attention: AttentionPlan = field(default_factory=AttentionPlan)
    calibration_samples: int = 1
    judging_samples: int = 1  # 0 leaves quality out of the manifest


def compress(
    family: Family, source: Path, recipe: Recipe, out: Path, *, base: str, device: str, on_progress: OnProgress,
    replace: bool = False,
) -> Manifest:  # fmt: skip
    """Writes the artifact `out` and returns its manifest. Refuses an `out` that exists, unless `replace`.

    Quality is measured on the artifact as a worker opens it, against the checkpoint in float32.
    """
    if out.exists() and not replace:
        raise FileExistsError(f"{out} exists: choose another name, or say --replace")
    out.parent.mkdir(parents=True, exist_ok=True)

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, of: on_progress(name, done, of)

    model: Model = family.load(source, device, torch.float32)
    full = model.outputs(recipe.judging_samples, stage("full precision"))
    layers = model.layers() if recipe.format.quantized else []
    stats = {}
    if layers:
        stats = observe(
            model.network,
            layers,
            lambda: model.calibrate(recipe.calibration_samples, stage("calibrate")),
            shared=model.shared(),
        )
    plan = {name: (recipe.method, recipe.format) for name in layers}
    reports = convert(model.network, plan, stats, lambda _, done, of: on_progress("quantize", done, of))
    manifest = Manifest(
        family=family.name,
        base=Base(name=base),
        method=artifact.method_record(recipe.method),
        layers=artifact.layer_records(reports),
        calibration=fingerprint(stats) if stats else None,
        attention=AttentionRecord.of(recipe.attention),
        serving={"kind": family.kind, "limits": asdict(model.limits())},
    )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.judged-") as aside:
        trial = Path(aside) / "artifact"
        manifest = artifact.save(trial, manifest, lambda folder: family.write(model, source, folder))
        del model
        gc.collect()
        if recipe.judging_samples:
            manifest = _judged(family, trial, manifest, full, recipe, device, stage("compressed"))
        return artifact.save(out, manifest, lambda folder: _moved(trial, folder), replace=replace)


def _judged(
    family: Family, folder: Path, manifest: Manifest, full: list[torch.Tensor], recipe: Recipe, device: str,
    on_sample: Callable[[int, int], None],
) -> Manifest:  # fmt: skip
    opened = family.open(folder, manifest, device)
    got = opened.outputs(recipe.judging_samples, on_sample)
    density = opened.attention.density()
    return manifest.model_copy(
        update={
            "quality": {"samples": recipe.judging_samples, **family.score(got, full)},
            "attention": AttentionRecord.of(recipe.attention, density),
        }
    )


def _moved(trial: Path, folder: Path) -> None:
    for path in sorted(trial.iterdir()):
        if path.name != artifact.MANIFEST:
            path.rename(folder / path.name)
