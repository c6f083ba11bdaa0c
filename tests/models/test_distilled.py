"""Checkpoints distilled to four steps without guidance: what their serving.json says is how they are made and run."""

from __future__ import annotations

import json

import pytest
import torch

from models import compress, load, registry
from models.base import VideoInputs
from models.compress import Recipe
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W8A8
from quant_runtime.methods import Rtn
from quant_runtime.sparsity.topk import TopK
from tests.models.films import nothing

STEPS = 4
FAMILIES = ("wan", "hunyuan_video", "cogvideox")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    family, folder = registry.family(request.param), tmp_path_factory.mktemp(request.param) / "checkpoint"
    family.tiny(folder)
    serving = json.loads((folder / "serving.json").read_text())
    serving["limits"] |= {"steps": STEPS, "max_steps": STEPS, "guidance": 1.0}
    (folder / "serving.json").write_text(json.dumps(serving))
    return family, folder


def defaults(limits, **change):
    names = ("width", "height", "frames", "fps", "steps", "guidance")
    return VideoInputs(**({name: getattr(limits, name) for name in names} | {"prompt": "a cat", "seed": 0} | change))


def passes(model, asked):
    """How many films each call of the network was of."""
    seen = []
    hook = model.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(len((args or [given["hidden_states"]])[0])), with_kwargs=True
    )
    model.film(asked, nothing)
    hook.remove()
    return seen


def test_without_guidance_a_step_is_one_pass_of_one_film(checkpoint):
    family, folder = checkpoint
    model = family.load(folder, "cpu", torch.float32)
    for guidance in (1.0, 0.0):
        assert passes(model, defaults(model.limits(), guidance=guidance)) == [1] * STEPS
    guided = passes(model, defaults(model.limits(), guidance=2.0))
    learned = family.name == "hunyuan_video"  # which is guided in the one pass that it takes
    assert sum(guided) == (STEPS if learned else 2 * STEPS)


def test_its_artifact_is_judged_and_served_with_four_steps_of_which_the_first_is_dense(checkpoint, tmp_path):
    family, folder = checkpoint
    recipe = Recipe(Rtn(), W8A8, AttentionPlan(TopK(0.5, block=16), warmup=0.1))
    words = {"base": "tiny", "device": "cpu"}
    made = compress.compress(family, folder, recipe, tmp_path / "out", on_progress=lambda *_: None, **words)
    limits = made.serving["limits"]
    assert (limits["steps"], limits["max_steps"], limits["guidance"]) == (STEPS, STEPS, 1.0)
    record = made.attention
    assert record.effective_density == pytest.approx((1 + 3 * record.sparse_density) / 4)
    model = load.load(tmp_path / "out", "cpu")
    assert passes(model, defaults(model.limits())) == [1] * STEPS
