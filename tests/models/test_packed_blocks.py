"""Artifacts whose blocks run in 8 bits from end to end: small checkpoints with heads that the FP8 kernels take."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from models import cogvideox_blocks, hunyuan_video_blocks, load, registry, tiny, wan_blocks
from models.compress import Recipe
from quant_runtime import quality
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import QuaRot, Rtn
from quant_runtime.residual import Residual
from quant_runtime.sparsity.topk import TopK
from tests.models import films
from tests.models.films import apart, inputs, nothing

KINDS = {
    "wan": ({"attention_head_dim": 32, "num_attention_heads": 2}, wan_blocks.Block),
    "hunyuan_video": (
        {"attention_head_dim": 32, "num_attention_heads": 2, "rope_axes_dim": (8, 12, 12)},
        hunyuan_video_blocks.Block,
    ),
    "cogvideox": ({"attention_head_dim": 64, "num_attention_heads": 2}, cogvideox_blocks.Block),
}
PLAN = AttentionPlan(TopK(0.6), warmup=0.5, dense_qk_bits=8, pv_bits=8)
LARGE = {"width": 96, "height": 96, "frames": 17}  # more tokens than one block of 128 holds


def checkpoint(name, folder):
    """The family's small checkpoint with a network of wider heads."""
    family = registry.family(name)
    family.tiny(folder / "narrow")
    config = family.transformer.load_config(folder / "narrow" / "transformer")
    torch.manual_seed(0)
    network = tiny.stirred(family.transformer.from_config(config | KINDS[name][0]))
    shutil.copytree(folder / "narrow", folder / "checkpoint")
    shutil.rmtree(folder / "checkpoint" / "transformer")
    network.save_pretrained(folder / "checkpoint" / "transformer")
    serving = json.loads((folder / "checkpoint" / "serving.json").read_text())
    serving["limits"] |= {"max_pixels": 96 * 96, "max_frames": 17}
    (folder / "checkpoint" / "serving.json").write_text(json.dumps(serving))
    return family, folder / "checkpoint"


@pytest.mark.parametrize("name", KINDS)
def test_an_artifact_in_8_bits_throughout_films_the_same_whenever_it_is_opened(name, tmp_path):
    family, source = checkpoint(name, tmp_path)
    recipe = Recipe(QuaRot(), QuantFormat.parse("w8a8"), PLAN)
    made = films.made(family, source, recipe, tmp_path / "artifact")
    assert made.manifest.attention.fp8_calls == 1.0
    model = load.load(tmp_path / "artifact", "cpu")
    block = next(iter(model.network.blocks if name == "wan" else model.network.transformer_blocks))
    assert isinstance(block.forward, KINDS[name][1])
    film = model.film(inputs(**LARGE), nothing)
    density = model.attention.density()
    assert density.packed == 1.0
    assert 0.3 < density.sparse < 1
    assert apart(load.load(tmp_path / "artifact", "cpu").film(inputs(**LARGE), nothing).frames, film.frames) == 0


@pytest.mark.parametrize("name", KINDS)
def test_blocks_in_8_bits_throughout_get_back_what_was_lost(name, tmp_path):
    family, source = checkpoint(name, tmp_path)
    plan = AttentionPlan(TopK(0.3), 0.3, dense_qk_bits=8, pv_bits=8)
    films.made(family, source, Recipe(Rtn(), QuantFormat.parse("w8a8"), plan, judging_samples=0), tmp_path / "artifact")
    model = load.load(tmp_path / "artifact", "cpu")
    asked, psnr = inputs(**LARGE, steps=6), {}
    model.attend(AttentionPlan(dense_qk_bits=8, pv_bits=8))
    dense = torch.from_numpy(model.film(asked, nothing).frames)
    for order in (None, 1, 2):
        model.attend(replace(plan, residual=order and Residual(2, order)))
        psnr[order] = quality.psnr(dense, torch.from_numpy(model.film(asked, nothing).frames))
        density = model.attention.density()
        assert density.packed == 1.0
    assert [refresh.step for refresh in density.residual.refreshes] == [0, 1, 4]
    assert density.residual.bytes == model.residual_bytes(asked) or name == "hunyuan_video", "whose text is shorter"
    assert psnr[None] < min(psnr[1], psnr[2]), psnr
