"""What the self-test of an artifact tests is what runs when the artifact does, whatever family it is of."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from models import compress, load, registry
from models.base import SceneInputs
from models.compress import Recipe
from models.selftest import check
from quant_runtime.artifact import ArtifactError
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels._versions import OPS, Version, examined
from quant_runtime.methods import QuaRot, Rtn, SmoothQuant
from quant_runtime.residual import Residual
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP
from tests.models import test_packed_blocks
from tests.models.films import inputs, nothing

SPARSE = AttentionPlan(TopK(0.6, block=16), warmup=0.5, dense_qk_bits=8)
FP8 = test_packed_blocks.PLAN
MASS = replace(FP8, policy=TopP(0.8, block=16), residual=Residual(interval=2))
FRAMES = AttentionPlan(TopK(0.6, block=16), qk_bits=16, dense_qk_bits=8, pv_bits=8)
RECIPES = {
    "wan turned, in 8 bits throughout": ("wan", Recipe(QuaRot(), QuantFormat.parse("w8a8"), FP8)),
    "wan in 8 bits throughout, blocks by mass": ("wan", Recipe(Rtn(), QuantFormat.parse("w4a6"), MASS)),
    "hunyuan_video turned, in 8 bits throughout": ("hunyuan_video", Recipe(QuaRot(), QuantFormat.parse("w4a4"), FP8)),
    "hunyuan_video in 8 bits throughout": ("hunyuan_video", Recipe(SmoothQuant(), QuantFormat.parse("w8a8"), FP8)),
    "hunyuan_video, whole weights and FP8 throughout": (
        "hunyuan_video",
        Recipe(SmoothQuant(), QuantFormat.parse("w4afp8"), FP8),
    ),
    "cogvideox in FP8 throughout": ("cogvideox", Recipe(Rtn(), QuantFormat.parse("fp8"), FP8)),
    "cogvideox": ("cogvideox", Recipe(Rtn(), QuantFormat.parse("w3a8"), SPARSE)),
    "cogvideox in 8 bits throughout": ("cogvideox", Recipe(Rtn(), QuantFormat.parse("w4a8"), FP8)),
    "cogvideox, sparse in floats": ("cogvideox", Recipe(Rtn(), QuantFormat.parse("w8a8"), replace(SPARSE, qk_bits=16))),
    "vggt": ("vggt", Recipe(QuaRot(), QuantFormat.parse("w4a8"), SPARSE)),
    "vggt, in 8 bits inside of frames": ("vggt", Recipe(Rtn(), QuantFormat.parse("w4a8"), FRAMES)),
    "vggt, dense": ("vggt", Recipe(Rtn(), QuantFormat.parse("w8a8"), AttentionPlan(dense_qk_bits=8))),
}


def made(name, folder):
    family, recipe = RECIPES[name]
    if family in test_packed_blocks.KINDS:
        _, checkpoint = test_packed_blocks.checkpoint(family, folder)
    else:
        registry.family(family).tiny(checkpoint := folder / "checkpoint")
    few = {"calibration_samples": 1, "judging_samples": 0}
    recipe = Recipe(recipe.method, recipe.format, recipe.attention, **few)
    told = {"base": "tiny", "device": "cpu", "on_progress": lambda stage, done, of: None}
    compress.compress(registry.family(family), checkpoint, recipe, folder / "artifact", **told)
    return folder / "artifact"


def run(artifact, folder):
    """Once, as a worker does it."""
    model = load.load(artifact, "cpu")
    if model.kind == "video":
        model.film(inputs(steps=6), nothing)
        return
    paths = tuple(folder / f"{n}.png" for n in range(2))
    for path in paths:
        Image.radial_gradient("L").resize((56, 56)).convert("RGB").save(path)
    (folder / "out").mkdir()
    model.run(SceneInputs(paths), folder / "out", nothing)


@pytest.mark.parametrize("name", RECIPES)
def test_every_op_that_an_artifact_runs_is_tested_first_and_passes(name, tmp_path):
    artifact, ran = made(name, tmp_path), set()

    def seen(op, device, args):
        ran.add(op.name)
        return op.running(device).call(*args)

    with examined(seen):
        run(artifact, tmp_path)
    report = check(artifact, "cpu")
    assert (report.verdict, report.failures) == ("passed", {})
    assert ran - report.versions.keys() == set()
    assert len(ran) >= 3


def test_an_op_that_is_broken_runs_by_another_and_run_json_says_so(tmp_path, monkeypatch):
    artifact = made("vggt", tmp_path)
    op = OPS["linear_packed"]
    wrong = Version(lambda *args: torch.zeros_like(op.reference(*args)), "broken")
    monkeypatch.setitem(op._versions, "cpu", (wrong, *op._versions["cpu"]))
    assert check(artifact, "cpu").verdict == "refused"
    assert check(artifact, "cpu", fallback=True).verdict == "fallback"
    run(artifact, tmp_path)
    said = json.loads((tmp_path / "out" / "run.json").read_text())["kernels"]
    op.rise("cpu")
    assert "not broken: broken is off by 1" in said["linear_packed"]
    assert "broken" not in said["linear"]


def test_a_folder_that_is_no_artifact_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"is no artifact: it has no manifest\.json"):
        check(tmp_path, "cpu")
