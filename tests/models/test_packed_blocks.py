"""Artifacts whose blocks run in 8 bits from end to end: small checkpoints with heads that the FP8 kernels take."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import rms_norm

from models import cogvideox_blocks, hunyuan_video_blocks, load, registry, tiny, wan_blocks
from models.compress import Recipe
from models.packed_blocks import Debts, attended
from models.video import rotated
from quant_runtime import quality
from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import QuaRot, Rtn, SmoothQuant
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from tests.models import films
from tests.models.films import apart, inputs, nothing
from tests.support import relative_error

KINDS = {
    "wan": ({"attention_head_dim": 32, "num_attention_heads": 2}, wan_blocks.Block),
    "hunyuan_video": (
        {"attention_head_dim": 32, "num_attention_heads": 2, "rope_axes_dim": (8, 12, 12)},
        hunyuan_video_blocks.Block,
    ),
    "cogvideox": ({"attention_head_dim": 64, "num_attention_heads": 2}, cogvideox_blocks.Block),
}
PLAN = AttentionPlan(TopK(0.6), warmup=0.5, dense_qk_bits=8, pv_bits=8)
FP8_VALUES = 0.06  # q and k in int8, values and what multiplies them in e4m3, on inputs of size one
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


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [
        *((name, QuaRot(), "W8A8") for name in KINDS),
        ("wan", SmoothQuant(), "FP8"),
        ("hunyuan_video", Rtn(), "W4AFP8"),
        ("cogvideox", QuaRot(), "FP8"),
    ],
)
def test_an_artifact_in_8_bits_throughout_films_the_same_whenever_it_is_opened(name, method, bits, tmp_path):
    family, source = checkpoint(name, tmp_path)
    recipe = Recipe(method, QuantFormat.parse(bits), PLAN)
    made = films.made(family, source, recipe, tmp_path / "artifact")
    assert made.manifest.attention.fp8_calls == 1.0
    assert {layer.format for layer in made.manifest.layers.values()} == {bits}
    model = load.load(tmp_path / "artifact", "cpu")
    block = next(iter(model.network.blocks if name == "wan" else model.network.transformer_blocks))
    assert isinstance(block.forward, KINDS[name][1])
    film = model.film(inputs(**LARGE), nothing)
    density = model.attention.density()
    assert density.packed == 1.0
    assert 0.3 < density.sparse < 1
    assert apart(load.load(tmp_path / "artifact", "cpu").film(inputs(**LARGE), nothing).frames, film.frames) == 0


@pytest.mark.parametrize(
    "policy", [Bands(0.3, 128, table=("st",)), Bands(0.3, 128, True, table=("st",)), Tiles(0.3, 128)]
)
@pytest.mark.parametrize("text_first", [False, True])
def test_projections_go_to_the_places_that_a_policy_has_for_their_tokens(policy, text_first, device):
    """Normed and turned by what they are, and not by where they lie."""
    layout, heads, size = TokenLayout(9, 8, 20, text=70, text_first=text_first), 2, 32
    qkv = torch.randn(2, layout.tokens, 3 * heads * size, device=device)
    norm, others = torch.rand(2, 2, size, device=device) + 0.5
    angles = torch.rand(layout.tokens - layout.text, size // 2, device=device) * 6
    state = AttentionState(AttentionPlan(policy, pv_bits=8))
    attn = SimpleNamespace(
        heads=heads, processor=SimpleNamespace(state=state, layer=0, model=SimpleNamespace(layout=layout))
    )
    got = attended(attn, qkv, tuple(norm), 1e-6, (angles.cos(), angles.sin()), tuple(others))

    q, k, v = qkv.unflatten(2, (3, heads, size)).permute(2, 0, 3, 1, 4)
    video = slice(layout.first, layout.first + len(angles))

    def placed(x, weight, other):
        out, turned = rms_norm(x, (size,), other, 1e-6), rms_norm(x[:, :, video], (size,), weight, 1e-6)
        out[:, :, video] = rotated(turned, *(t.repeat_interleave(2, dim=1) for t in (angles.cos(), angles.sin())))
        return out

    plain = AttentionState(AttentionPlan(policy, qk_bits=16))
    want = attend(placed(q, norm[0], others[0]), placed(k, norm[1], others[1]), v, layer=0, layout=layout, state=plain)
    assert relative_error(got, want.transpose(1, 2).flatten(2)) < FP8_VALUES
    assert state.density().sparse == plain.density().sparse < 0.6


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


def test_what_is_owed_and_never_asked_for_is_an_error_and_not_another_film():
    debts = Debts()
    x = torch.ones(1, 2, 3)
    debts.owe(x, x, torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="was given another tensor"):
        debts.close()
    debts.owed(x)
    debts.close()
