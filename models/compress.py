"""A checkpoint goes in, an artifact comes out: observe, convert, write aside, judge what was written, rename it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from models import hub
from models.base import Family, Model, OnStep
from models.lora import Lora, Loras
from quant_runtime import artifact
from quant_runtime.artifact import AttentionRecord, Base, Manifest
from quant_runtime.attention import AttentionPlan, SharedState
from quant_runtime.calibrate import LayerStats, Observer, fingerprint, observe
from quant_runtime.convert import convert
from quant_runtime.formats import W16A16, QuantFormat
from quant_runtime.methods import Method, Rtn
from quant_runtime.rules import Rule, formats
from quant_runtime.sparsity.base import Choosing

OnProgress = Callable[[str, int, int], None]  # (what is being done, how much of it, of how much)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is compressed. A value."""

    method: Method = field(default_factory=Rtn)
    format: QuantFormat = W16A16
    attention: AttentionPlan = field(default_factory=AttentionPlan)
    calibration_samples: int = 1
    judging_samples: int = 1  # 0 leaves quality out of the manifest
    rules: tuple[Rule, ...] = ()  # layers that get another format than `format`
    loras: tuple[Lora, ...] = ()  # merged before anything else
    table: bool = False  # what heads would choose as they run is settled by the calibration samples


def compress(
    family: Family,
    source: Path,
    recipe: Recipe,
    out: Path,
    *,
    base: str,
    device: str,
    on_progress: OnProgress,
    replace: bool = False,
) -> Manifest:
    """Writes the artifact `out` and returns its manifest. Refuses an `out` that exists, unless `replace`.

    Quality is measured on the artifact as a worker opens it, against the checkpoint in float32.
    """
    artifact.check_free(out, replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.judged-") as aside:
        trial = Path(aside) / "artifact"
        manifest, full = _written(family, source, recipe, trial, base, device, on_progress)
        gc.collect()  # the float model is gone before the compressed one is opened
        if recipe.judging_samples:
            opened = family.open(trial, manifest, device)
            got = opened.outputs(recipe.judging_samples, partial(on_progress, "compressed"))
            quality = {"samples": recipe.judging_samples, **family.score(got, full)}
            attention = AttentionRecord.of(opened.attention.plan, opened.attention.density())
            manifest = manifest.model_copy(update={"quality": quality, "attention": attention})
        return artifact.save(out, manifest, partial(_moved, trial), replace=replace)


def _written(
    family: Family, source: Path, recipe: Recipe, trial: Path, base: str, device: str, on_progress: OnProgress
) -> tuple[Manifest, list[torch.Tensor]]:
    """The artifact without its quality, and what the checkpoint made of the judging samples in full precision."""
    model = family.load(source, device, torch.float32)
    family.suits(model.network, recipe.attention)
    with Loras(recipe.loras, model.network, family.originals) as loras:
        loras.merge_into(model.network)
    chosen = formats(model.network, model.layers(), recipe.format, recipe.rules)
    layers = [name for name, format_ in chosen.items() if format_.quantized]
    attention = recipe.attention
    if recipe.table:
        attention = tabled(model, attention, recipe.calibration_samples, partial(on_progress, "table"))
    full = model.outputs(recipe.judging_samples, partial(on_progress, "full precision"))
    stats: dict[str, LayerStats] = {}
    if layers:
        stats = observe(model.network, layers, partial(_calibrated, model, recipe, on_progress), shared=model.shared())
    plan = {name: (recipe.method, chosen[name]) for name in layers}
    reports = convert(model.network, plan, stats, lambda _, done, of: on_progress("quantize", done, of))
    manifest = Manifest(
        family=family.name,
        base=Base(name=base, revision=hub.revision(source), loras=loras.records),
        method=artifact.method_record(recipe.method),
        layers=artifact.layer_records(reports),
        kept=tuple(name for name in chosen if name not in reports) if reports else (),
        calibration=fingerprint(stats) if stats else None,
        attention=AttentionRecord.of(attention),
        serving={"kind": family.kind, "limits": json.loads(json.dumps(asdict(model.limits())))},
    )
    return artifact.save(trial, manifest, partial(family.write, model, source)), full


def tabled(model: Model, plan: AttentionPlan, samples: int, on_sample: OnStep) -> AttentionPlan:
    """The plan with a table of what heads choose, in every sparse call of so many calibration samples.

    ValueError for a policy whose heads choose nothing, and for a model of several networks.
    """
    policy = plan.policy
    if not isinstance(policy, Choosing):
        raise ValueError(f"a table is for a policy whose heads choose, as those of bands do; got {policy}")
    if isinstance(model.attention, SharedState):
        raise ValueError("a table is of one network's heads, and here several take turns: leave it out")
    model.attend(replace(plan, residual=None))
    votes: dict[int, list[torch.Tensor]] = {}
    model.attention.votes = votes
    model.calibrate(samples, on_sample)
    model.attend(AttentionPlan())
    return replace(plan, policy=policy.settled(votes))


def _calibrated(model: Model, recipe: Recipe, on_progress: OnProgress, seen: Observer) -> None:
    def sampled(done: int, of: int) -> None:
        seen.run = done
        on_progress("calibrate", done, of)

    model.calibrate(recipe.calibration_samples, sampled)


def _moved(trial: Path, folder: Path) -> None:
    for path in sorted(trial.iterdir()):
        if path.name != artifact.MANIFEST:
            path.rename(folder / path.name)
