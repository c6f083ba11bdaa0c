"""The Wan family on a checkpoint of a few kilobytes, with the layout of a real one."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from models import compress, load, registry, tiny, tiny_wan
from models.base import BadInput, SceneInputs, VideoInputs
from models.compress import Recipe
from models.published import PUBLISHED
from models.wan import Serving, Wan
from quant_runtime import artifact
from quant_runtime.artifact import ArtifactError
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W16A16, QuantFormat
from quant_runtime.linear import QuantLinear
from quant_runtime.methods import Keep, QuaRot, Rtn
from quant_runtime.sparsity.topk import TopK
from tests.models import films

EXPERTS = ("transformer", "transformer_2")
SAME_PSNR = 40.0  # dB: two roundings of one computation to 16 bits; another seed of this model gives some 25


def inputs(**change) -> VideoInputs:
    asked = {"prompt": "a red ball", "width": 48, "height": 32, "frames": 5, "fps": 8, "steps": 2, "guidance": 2.0}
    return VideoInputs(**(asked | {"seed": 1} | change))


def nothing(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "checkpoint"
    Wan().tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return Wan().load(checkpoint, "cpu", torch.float32)


RECIPES = {
    "full": Recipe(Keep(), W16A16),
    "w8a8": Recipe(Rtn(), QuantFormat.parse("w8a8")),
    "w4a8-sparse": Recipe(QuaRot(), QuantFormat.parse("w4a8"), AttentionPlan(TopK(0.5, block=16), dense_qk_bits=8)),
}


@pytest.fixture(scope="module", params=RECIPES)
def made(request, checkpoint, tmp_path_factory):
    """(artifact's folder, manifest, recipe)"""
    out = tmp_path_factory.mktemp("artifacts") / request.param
    recipe = RECIPES[request.param]
    manifest = compress.compress(
        Wan(), checkpoint, recipe, out, base="tiny", device="cpu", on_progress=lambda stage, done, of: None
    )
    return out, manifest, recipe


def test_a_folder_is_recognized_by_its_index_alone(checkpoint, tmp_path):
    assert registry.family_of(checkpoint).name == "wan"
    with pytest.raises(ValueError, match="no checkpoint"):
        registry.family_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "billions", "gib"), [("wan-2.1-1.3b", 1.4190, 2.643), ("wan-2.1-14b", 14.2885, 26.614)]
)
def test_at_its_true_size_it_has_the_published_parameters(name, billions, gib):
    counted = sum(parameter.numel() for parameter in PUBLISHED[name].on_meta().parameters())
    assert (round(counted / 1e9, 4), round(2 * counted / 2**30, 3)) == (billions, gib)


def test_the_same_inputs_give_the_same_film_and_another_seed_another(model):
    one, again, other = (model.film(inputs(seed=seed), nothing).frames for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"width": 40}, "width"),
        ({"height": 0}, "height"),
        ({"width": 96, "height": 96}, "width"),
        ({"frames": 4}, "frames"),
        ({"frames": 401}, "frames"),
        ({"steps": 0}, "steps"),
        ({"prompt": "ball " * 80}, "prompt"),
        ({"negative_prompt": "ball " * 80}, "negative_prompt"),
    ],
)
def test_what_it_cannot_film_is_refused_by_the_field_s_name(model, change, field):
    with pytest.raises(BadInput) as refused:
        model.film(inputs(**change), nothing)
    assert refused.value.field == field


# The other kinds of checkpoint


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A tiny checkpoint's folder by its kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in tiny_wan.KINDS:
        Wan().tiny(folder / kind, kind)
    return {kind: folder / kind for kind in tiny_wan.KINDS}


BLOCK = {
    *(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")), "ffn.net.0.proj", "ffn.net.2"
}  # fmt: skip


def test_what_a_block_asks_a_picture_shrinks_too(kinds):
    model = Wan().load(kinds["i2v"], "cpu", torch.float32)
    seeing = {"attn2.add_k_proj", "attn2.add_v_proj"}
    assert {name.removeprefix("blocks.1.") for name in model.layers() if "blocks.1." in name} == BLOCK | seeing
    assert ["blocks.0.attn2.add_k_proj", "blocks.0.attn2.add_v_proj"] in model.shared()
    assert not any("image_embedder" in name for name in model.layers())


def test_layers_of_two_experts_are_told_apart_by_their_folders(kinds):
    model = Wan().load(kinds["t2v-a14b"], "cpu", torch.float32)
    wanted = {f"{expert}.blocks.{i}.{name}" for expert in EXPERTS for i in (0, 1) for name in BLOCK}
    assert {*model.layers()} == wanted
    assert ["transformer_2.blocks.1.attn1.to_q", *(f"transformer_2.blocks.1.attn1.to_{x}" for x in "kv")] in (
        model.shared()
    )


def test_each_expert_goes_sparse_and_the_manifest_says_how_far(kinds, tmp_path):
    recipe = Recipe(Rtn(), QuantFormat.parse("w8a8"), AttentionPlan(TopK(0.5, block=16)))
    manifest = compress.compress(
        Wan(), kinds["i2v-a14b"], recipe, tmp_path / "out", base="tiny", device="cpu", on_progress=lambda *_: None
    )
    densities = manifest.attention.network_densities
    assert densities.keys() == set(EXPERTS)
    assert all(0 < density < 1 for density in densities.values())
    model = load.load(tmp_path / "out", "cpu")
    assert all(hasattr(block.attn1, "fused_qkv") for part in model.network.values() for block in part.blocks)
    assert {a.processor.state for a in model.attentions(model.network["transformer_2"]).values()} == {
        model.attention.states["transformer_2"]
    }


def test_calibration_that_never_reaches_an_expert_names_its_first_layer(kinds, tmp_path):
    late = films.changed(kinds["t2v-a14b"], tmp_path / "late", "model_index.json", boundary_ratio=1e-6)
    with pytest.raises(ValueError, match=r"never reached transformer_2\.blocks\.0"):
        compress.compress(
            Wan(), late, Recipe(Rtn(), QuantFormat.parse("w8a8"), judging_samples=0), tmp_path / "out",
            base="tiny", device="cpu", on_progress=lambda *_: None,
        )  # fmt: skip


def test_the_second_expert_s_guidance_goes_with_the_first_s_and_not_below_none(kinds):
    model = Wan().load(kinds["t2v-a14b"], "cpu", torch.float32)
    asked = [model.asked(inputs(guidance=guidance)) for guidance in (4.0, 1.2)]
    assert [(a["guidance_scale"], a["guidance_scale_2"]) for a in asked] == [(4.0, 3.0), (1.2, 1.0)]


def test_a_picture_is_needed_taken_or_refused_as_the_kind_has_it(kinds):
    assert {kind: Wan().limits(folder).image for kind, folder in kinds.items()} == {
        "t2v": "none", "i2v": "required", "t2v-a14b": "none", "i2v-a14b": "required", "ti2v-5b": "optional"
    }  # fmt: skip
    model = Wan().load(kinds["i2v"], "cpu", torch.float32)
    with pytest.raises(BadInput, match="needed") as refused:
        model.film(inputs(), nothing)
    assert refused.value.field == "image"


def test_a_ti2v_folder_saved_as_the_other_pipeline_films_the_same(kinds, tmp_path):
    """From text alone too: the hub's is a WanPipeline."""
    given = films.changed(kinds["ti2v-5b"], tmp_path, "model_index.json", _class_name="WanImageToVideoPipeline")
    one, other = (Wan().load(folder, "cpu", torch.float32) for folder in (kinds["ti2v-5b"], given))
    for image in (None, given / "start.png"):
        asked = inputs(width=64, height=64, image=image)
        assert np.array_equal(one.film(asked, nothing).frames, other.film(asked, nothing).frames)


def test_without_a_serving_json_each_kind_has_the_published_defaults_and_pictures(kinds, tmp_path):
    found = {}
    for kind, folder in kinds.items():
        artifact.link_or_copy(folder, tmp_path / kind)
        (tmp_path / kind / "serving.json").unlink()
        serving = Wan().served(tmp_path / kind)
        assert all(image is None or image.is_file() for image in serving.calibration_images + serving.judging_images)
        size = serving.limits
        found[kind] = (size.width, size.height, size.frames, size.fps, size.steps, size.guidance, serving.max_tokens)
        assert any(serving.calibration_images) == (size.image != "none")
        Wan().load(tmp_path / kind, "cpu", torch.float32)
    assert found == {
        "t2v": (832, 480, 81, 16, 50, 5.0, 512),
        "i2v": (832, 480, 81, 16, 40, 5.0, 512),
        "t2v-a14b": (832, 480, 81, 16, 40, 4.0, 512),
        "i2v-a14b": (832, 480, 81, 16, 40, 3.5, 512),
        "ti2v-5b": (1280, 704, 121, 24, 50, 5.0, 512),
    }


def test_the_hub_s_names_of_parts_are_read(kinds, tmp_path):
    """`CLIPImageProcessor`, which here is another class where torchvision is missing; no second expert, as nulls."""
    index = {"image_processor": ["transformers", "CLIPImageProcessor"], "transformer_2": [None, None]}
    films.changed(kinds["i2v"], tmp_path, "model_index.json", **index, boundary_ratio=None)
    one, other = (Wan().load(folder, "cpu", torch.float32) for folder in (kinds["i2v"], tmp_path))
    asked = inputs(image=tmp_path / "start.png")
    assert np.array_equal(one.film(asked, nothing).frames, other.film(asked, nothing).frames)


@pytest.mark.parametrize(
    ("kind", "file", "fields", "said"),
    [
        ("i2v", "transformer/config.json", {"pos_embed_seq_len": 514}, "first and a last picture"),
        ("i2v", "transformer/config.json", {"in_channels": 33}, "has 33 input channels; 36 are run"),
        ("t2v", "transformer/config.json", {"in_channels": 36}, "has 36 input channels; 16 are run"),
        ("i2v", "model_index.json", {"image_encoder": [None, None]}, "an image_encoder sees, and there is none"),
        ("i2v", "serving.json", {"max_tokens": 64}, "max_tokens is 512"),
        ("t2v-a14b", "model_index.json", {"boundary_ratio": None}, "boundary_ratio"),
        ("t2v-a14b", "model_index.json", {"transformer_2": [None, None]}, "boundary_ratio"),
        ("t2v-a14b", "transformer_2/config.json", {"in_channels": 36}, "transformer_2 has 36 input channels"),
        ("t2v-a14b", "serving.json", {"low_noise_guidance": 0}, "low_noise_guidance"),
        ("t2v", "serving.json", {"low_noise_guidance": 0.75}, "low_noise_guidance"),
        ("t2v", "serving.json", {"limits": asdict(replace(tiny.LIMITS, image="optional"))}, "limits.image is none"),
        ("i2v", "serving.json", {"calibration_images": []}, "calibration_images are needed"),
        ("i2v", "serving.json", {"judging_images": ["gone.png"]}, r"judging_images: there is no .*gone\.png"),
        ("i2v", "serving.json", {"judging_images": ["../start.png"]}, "no file in the checkpoint's folder"),
        ("t2v", "serving.json", {"calibration_images": ["start.png"]}, "limits have none"),
        ("t2v", "model_index.json", {"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
    ],
)
def test_what_is_not_run_is_refused_by_its_name_before_any_weights_are_read(kinds, tmp_path, kind, file, fields, said):
    films.changed(kinds[kind], tmp_path, file, **fields)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for enter in (Wan().skeleton, lambda folder: Wan().load(folder, "cpu", torch.float32)):
        with pytest.raises(ValueError, match=said):
            enter(tmp_path)


@pytest.mark.parametrize("pipeline", ["WanVACEPipeline", "WanAnimatePipeline"])
def test_another_of_wan_s_pipelines_is_refused_by_its_name(kinds, tmp_path, pipeline):
    films.changed(kinds["t2v"], tmp_path, "model_index.json", _class_name=pipeline)
    with pytest.raises(ValueError, match=f"names a {pipeline}"):
        registry.family_of(tmp_path)


def test_a_start_image_is_taken_where_the_limits_say_so(model, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="not taken") as refused:
        model.film(inputs(image=tmp_path / "start.png"), nothing)
    assert refused.value.field == "image"
    limits = replace(model.serving.limits, image="required")
    monkeypatch.setattr(model, "serving", model.serving.model_copy(update={"limits": limits}))
    with pytest.raises(BadInput, match="needed") as refused:
        model.film(inputs(), nothing)
    assert refused.value.field == "image"


def test_pictures_are_refused(model, tmp_path):
    with pytest.raises(BadInput, match="prompts"):
        model.run(SceneInputs(images=(tmp_path / "x.png",)), tmp_path, nothing)


def test_a_run_leaves_a_film_a_poster_and_a_record(made, tmp_path):
    folder, manifest, _ = made
    outputs = load.load(folder, "cpu").run(inputs(), tmp_path, nothing)
    assert [file.name for file in outputs.files] == ["video.mp4", "poster.jpg", "run.json"]
    with av.open(str(tmp_path / "video.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 48, 32)
        assert sum(1 for _ in film.decode(video=0)) == 5
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["inputs"]["seed"] == 1
    assert record["seconds"].keys() == {"text", "denoise", "decode", "total"}
    assert record["attention"]["policy"]["name"] == manifest.attention.policy.name
    assert record["kernels"].keys() == {"linear", "attention"}


def test_an_artifact_stays_close_to_its_checkpoint_and_says_how_close(made):
    _, manifest, _ = made
    assert manifest.quality["psnr"] > SAME_PSNR
    assert 0.9 < manifest.quality["ssim"] <= 1


def test_the_density_in_the_manifest_was_measured(made):
    _, manifest, recipe = made
    sparse = isinstance(recipe.attention.policy, TopK)
    assert (0 < manifest.attention.effective_density < 1) == sparse


def test_its_layers_are_those_of_the_blocks(made):
    folder, manifest, recipe = made
    network = load.load(folder, "cpu").network
    low = [name for name, module in network.named_modules() if isinstance(module, QuantLinear)]
    assert bool(low) == recipe.format.quantized
    assert all(name.startswith("blocks.") for name in (*low, *manifest.layers))
    assert len(manifest.layers) == (10 * len(network.blocks) if recipe.format.quantized else 0)


def test_diffusers_opens_it_with_the_layers_that_a_worker_opens(made):
    folder, manifest, _ = made
    importlib.import_module("quant_runtime.diffusers")  # teaches from_pretrained what an artifact's layers are
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    own = Wan().load(folder, "cpu", torch.float32)
    state, want = pipe.transformer.state_dict(), own.network.state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], want[name]) for name in want)
    assert len([m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]) == len(manifest.layers)


def test_a_damaged_file_is_refused_by_its_name(made, tmp_path):
    folder, _, _ = made
    damaged = tmp_path / "artifact"
    damaged.mkdir()
    for path in sorted(folder.rglob("*")):
        copy = damaged / path.relative_to(folder)
        copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"transformer/diffusion_pytorch_model\.safetensors"):
        load.load(damaged, "cpu")


def test_an_artifact_that_is_there_is_kept_unless_it_is_to_be_replaced(made, checkpoint):
    folder, _, recipe = made
    with pytest.raises(FileExistsError, match=folder.name):
        compress.compress(Wan(), checkpoint, recipe, folder, base="tiny", device="cpu", on_progress=print)
    assert load.load(folder, "cpu").limits() == Serving.read(checkpoint).limits


def test_a_field_that_serving_json_does_not_have_is_refused(checkpoint, tmp_path):
    (tmp_path / "serving.json").write_text('{"max_token": 3}')
    with pytest.raises(ValueError, match="max_token"):
        Serving.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"limits": {"max_frame": 3}}', "max_frame"), ("[]", "serving.json"), ('{"max_tokens": "512"}', "max_tokens"),
     ('{"calibration": []}', "calibration")],
)  # fmt: skip
def test_a_serving_json_that_will_not_do_is_refused_by_its_field(tmp_path, text, said):
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Serving.read(tmp_path)


def test_a_damaged_checkpoint_is_refused_by_its_name(checkpoint, tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json"):
        registry.family_of(tmp_path)
    for path in sorted(checkpoint.rglob("*")):
        copy = tmp_path / path.relative_to(checkpoint)
        copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=tmp_path.name):
        Wan().load(tmp_path, "cpu", torch.float32)


def test_an_artifact_is_no_checkpoint_and_nothing_but_an_artifact_is_replaced(made, checkpoint):
    with pytest.raises(ValueError, match="is an artifact"):
        registry.family_of(made[0])
    with pytest.raises(FileExistsError, match="no artifact"):
        compress.compress(
            Wan(), checkpoint, made[2], checkpoint, base="tiny", device="cpu", on_progress=print, replace=True
        )
    assert (checkpoint / "model_index.json").is_file()
