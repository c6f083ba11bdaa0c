"""The Wan family on a checkpoint of a few kilobytes, with the layout of a real one."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from models import compress, load, registry
from models.base import BadInput, SceneInputs, VideoInputs
from models.compress import Recipe
from models.published import PUBLISHED
from models.wan import Serving, Wan
from quant_runtime.artifact import ArtifactError
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W16A16, QuantFormat
from quant_runtime.linear import QuantLinear
from quant_runtime.methods import Keep, QuaRot, Rtn
from quant_runtime.sparsity.topk import TopK

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


def test_dense_in_full_precision_it_films_what_diffusers_films(checkpoint, model):
    stock = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    asked = inputs()
    want = stock(
        prompt=asked.prompt, negative_prompt="", width=48, height=32, num_frames=5, num_inference_steps=2,
        guidance_scale=2.0, generator=torch.Generator().manual_seed(1), max_sequence_length=64, output_type="np",
    ).frames[0]  # fmt: skip
    got = model.film(asked, nothing).frames
    assert np.abs(got.astype(int) - (want * 255).round().astype(int)).max() <= 1  # a rounding of 8 bits


def test_the_same_inputs_give_the_same_film_and_another_seed_another(model):
    one, again, other = (model.film(inputs(seed=seed), nothing).frames for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_every_step_is_told_and_what_is_raised_there_ends_the_run(model):
    seen = []
    model.film(inputs(steps=3), lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done, of):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.film(inputs(steps=3), stop)


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
