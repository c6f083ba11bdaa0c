"""A command line's words become a recipe, or an error that names the word."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from models import load
from models.wan import Wan
from quant_runtime import artifact
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W3A8, W4A8, W8A8, W16A16
from quant_runtime.kernels.unpack import packed_bytes
from quant_runtime.methods import QuaRot, Rtn
from quant_runtime.residual import Residual
from quant_runtime.rules import Rule
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.dense import Dense
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP
from service import offline
from service.cli import app
from tests.models.films import inputs, nothing


def plan(text: str) -> AttentionPlan:
    return offline.plan(text, 0.1, 8, 16)


def test_a_policy_is_its_name_its_density_and_its_fields():
    assert plan("dense") == AttentionPlan(Dense(), 0.1)
    assert plan("topk:0.3") == AttentionPlan(TopK(0.3), 0.1)
    assert plan("topk") == AttentionPlan(TopK(), 0.1)
    assert plan("topk:0.3,block=32,first_frame=true") == AttentionPlan(TopK(0.3, 32, True), 0.1)
    assert plan("bands:0.3,first_frame=true") == AttentionPlan(Bands(0.3, first_frame=True), 0.1)
    assert plan("bands:density=0.3") == AttentionPlan(Bands(0.3), 0.1)
    assert plan("tiles:window=3,5,5,block=32") == AttentionPlan(Tiles(block=32, window=(3, 5, 5)), 0.1)
    assert plan("topp:0.8,alike=0") == AttentionPlan(TopP(mass=0.8, alike=0.0), 0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topk:2", "density"),
        ("topk:0.3,blok=2", "blok"),
        ("best:0.3", "topk"),
        ("topk:x", "'x'"),
        ("topk:0.3,0.4", "'0.3,0.4'"),
        ("dense:0.5", "has no field 'density': it has none"),
        ("tiles:0.2,window=3,x", "'x'"),
        ("topp:density=0.2", "mass"),
    ],
)
def test_a_policy_that_is_none_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        plan(text)


def test_bits_of_q_and_k_that_no_kernel_has_are_refused_by_the_option():
    with pytest.raises(ValueError, match=r"--dense-qk-bits is 8 or 16; got 4"):
        offline.plan("dense", 0.0, 8, 4)
    with pytest.raises(ValueError, match=r"--pv-bits is 8 or 16; got 6"):
        offline.plan("dense", 0.0, 8, 8, 6)
    assert offline.plan("dense", 0.0, 8, 8, 8) == AttentionPlan(dense_qk_bits=8, pv_bits=8)
    for given in (("dense", 0.0, 8, 16, 8), ("topk:0.5", 0.0, 16, 16, 8)):
        with pytest.raises(ValueError, match="--pv-bits 8 goes with q and k of 8 bits"):
            offline.plan(*given)


def test_a_residual_is_its_interval_and_what_else_is_said_of_it():
    its = offline.residual(5, order=None, rank=8, bits=None, place="auto")
    assert its == Residual(5, 2, 8, 8, "auto")
    assert offline.plan("topk:0.3", 0.1, 8, 16, 16, its) == AttentionPlan(TopK(0.3), 0.1, residual=its)
    assert offline.residual(None, order=None, rank=None, bits=None, place=None) is None
    with pytest.raises(ValueError, match="--residual-bits goes with --refresh"):
        offline.residual(None, order=None, rank=None, bits=16, place=None)
    with pytest.raises(ValueError, match="order is one of 1, 2; got 3"):
        offline.residual(5, order=3)
    with pytest.raises(ValueError, match="interval is at least 1; got 0"):
        offline.residual(0)
    with pytest.raises(ValueError, match="--refresh is for what sparse attention loses"):
        offline.plan("dense", 0.1, 8, 16, 16, its)


def test_fields_of_a_method_are_set_by_name():
    made = offline.recipe("quarot", ["w4a8"], ["seed=3", "rounding.clip=mse"], AttentionPlan(), 2, 1)
    assert made.method == QuaRot(seed=3, rounding=Rtn(clip="mse"))
    assert str(made.format) == "W4A8"


def test_a_table_is_for_heads_that_choose_and_for_a_model_that_films():
    assert offline.recipe("rtn", [], [], plan("bands:0.3"), 1, 1, table=True).table
    with pytest.raises(ValueError, match=r"--table .* goes with --sparsity bands"):
        offline.recipe("rtn", [], [], plan("topk:0.3"), 1, 1, table=True)


@pytest.mark.parametrize("bits", ["w2a8", "w3a6", "w3a8", "w5a8", "w6a6", "w7a4", "fp8", "w4afp8", "w2afp8"])
def test_every_width_of_weights_makes_a_recipe(bits):
    assert str(offline.recipe("rtn", [bits], [], AttentionPlan(), 1, 1).format) == bits.upper()


def test_patterns_of_bits_are_rules_in_their_order_and_what_is_kept_comes_last():
    made = offline.recipe("rtn", ["ff.*=w8a8", "w4a8", "*.net.2=w3a8"], [], AttentionPlan(), 1, 1, ["blocks.0.*"])
    assert made.format == W4A8
    assert made.rules == (Rule("ff.*", W8A8), Rule("*.net.2", W3A8), Rule("blocks.0.*", W16A16))
    assert offline.recipe("rtn", [], [], AttentionPlan(), 1, 1).format == W8A8
    only = offline.recipe("rtn", ["w16a16", "ff.*=w8a8"], [], AttentionPlan(), 1, 1)
    assert (only.format, only.rules) == (W16A16, (Rule("ff.*", W8A8),))


@pytest.mark.parametrize(
    ("method", "bits", "said"),
    [
        ("rtn", ["w4a8", "w8a8"], "one format for all layers"),
        ("rtn", ["w4a8", "=w8a8"], "PATTERN=FORMAT"),
        ("rtn", ["w4a8", "ff.*=w9a8"], "2 to 8"),
        ("rtn", ["w4a8", "ff.*=w4a16"], "W4A16"),
        ("rtn", ["fp8", "ff.*=w8afp8"], "W2AFP8 to W5AFP8; got W8AFP8"),
        ("rtn", ["fp8", "w4afp8"], "one format for all layers"),
        ("none", ["fp8"], "--method none"),
        ("none", ["w16a16", "ff.*=w8a8"], "--method none"),
        ("none", [], "w16a16"),
    ],
)
def test_bits_that_cannot_be_are_refused(method, bits, said):
    with pytest.raises(ValueError, match=said):
        offline.recipe(method, bits, [], AttentionPlan(), 1, 1)


@pytest.mark.parametrize(
    ("method", "bits", "settings", "said"),
    [
        ("none", "w4a8", [], "w16a16"),
        ("rtn", "w16a16", [], "w16a16"),
        ("gptq", "w4a8", [], "quarot"),
        ("rtn", "w5", [], "w5"),
        ("rtn", "w4a8", ["clip"], "NAME=VALUE"),
        ("rtn", "w4a8", ["clip=best"], "clip"),
        ("rtn", "w4a16", [], "W4A16"),
        ("rtn", "w3a16", [], "kernels for W2 to W8"),
        ("rtn", "w9a8", [], "2 to 8 or 16 bits"),
        ("rtn", "w1a8", [], "W1A8"),
        ("none", "w16a8", [], "w16a16"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(method, bits, settings, said):
    with pytest.raises(ValueError, match=said):
        offline.recipe(method, [bits], settings, AttentionPlan(), 1, 1)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_none_or_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=device):
        offline.resolve(device)
    assert offline.resolve("auto") == "cpu"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact made by the command, and what the command said."""
    folder = tmp_path_factory.mktemp("offline")
    Wan().tiny(folder / "tiny")
    words = ["quantize", str(folder / "tiny"), "--method", "rtn", "--bits", "w4a8", "--out", str(folder / "artifact")]
    words += ["--calibration-samples", "1", "--judging-samples", "1", "--sparsity", "topk:0.5,block=16"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return folder / "artifact", done.output


def test_quantize_says_what_came_of_it(made):
    _, said = made
    assert "quantizing layers" in said
    assert "× W4A8" in said
    assert "psnr" in said


def test_a_residual_goes_from_the_command_line_to_the_table(made, tmp_path):
    out = tmp_path / "film"
    words = ["quantize", str(made[0].parent / "tiny"), "--out", str(out), "--sparsity", "topk:0.5,block=16"]
    words += ["--calibration-samples", "1", "--judging-samples", "1", "--refresh", "1", "--residual-order", "1"]
    done = CliRunner().invoke(app, [*words, "--residual-place", "auto"])
    assert done.exit_code == 0, done.output
    residual = json.loads((out / "manifest.json").read_text())["attention"]["residual"]
    assert (residual["interval"], residual["order"], residual["place"], residual["placed"]) == (1, 1, "auto", "device")
    said = dict(offline.rows(artifact.read_manifest(out)))["residual"]
    assert said == (
        f"refreshed after 1 sparse steps, first order, 8 bits, device; {residual['bytes']:,} bytes for a film of the "
        "default size"
    )
    for more, named in (["--residual-order", "2"], "heads"), (["--residual-place", "disk"], "device, host, auto"):
        refused = CliRunner().invoke(app, [*words, "--replace", *more])
        assert (refused.exit_code, named in refused.output) == (2, True)
    refused = CliRunner().invoke(app, ["quantize", "demo-video", "--out", str(out), "--residual-bits", "16"])
    assert (refused.exit_code, "--residual-bits goes with --refresh" in refused.output) == (2, True)


def test_three_bits_go_from_the_command_line_to_the_table(made, tmp_path):
    out = tmp_path / "three"
    words = ["quantize", str(made[0].parent / "tiny"), "--bits", "w3a6", "--out", str(out)]
    words += ["--calibration-samples", "1", "--judging-samples", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "× W3A6" in CliRunner().invoke(app, ["inspect", str(out)]).output
    layers = json.loads((out / "manifest.json").read_text())["layers"].values()
    assert {layer["format"] for layer in layers} == {"W3A6"}
    for layer in layers:  # a scale of 16 bits for each output, and a bias
        assert layer["bytes"] == layer["out_features"] * (packed_bytes(layer["in_features"], 3) + 2 + 2 * layer["bias"])


def test_inspect_gives_the_manifest_as_a_table_or_as_json(made):
    folder, _ = made
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0
    assert "topk" in shown.output
    whole = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output)
    assert whole == json.loads((folder / "manifest.json").read_text())


def test_inspect_tells_the_bits_of_attention_and_the_density_of_each_network(made):
    manifest = artifact.Manifest.model_validate_json((made[0] / "manifest.json").read_text())
    own = {"transformer": 0.5, "transformer_2": 0.25}
    attention = manifest.attention.model_copy(
        update={"effective_density": 0.375, "network_densities": own, "pv_bits": 8, "fp8_calls": 0.9}
    )
    said = dict(offline.rows(manifest.model_copy(update={"attention": attention})))["attention"]
    assert "37.5% of key blocks kept, mean over all steps (transformer 50.0%, transformer_2 25.0%)" in said
    assert said.endswith("q and k in 8 bits, dense 16, values 8 in 90% of calls")


def test_a_folder_that_is_no_artifact_and_a_checkpoint_that_is_none_are_named(tmp_path, made):
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert (shown.exit_code, "manifest.json" in shown.output) == (2, True)
    refused = CliRunner().invoke(app, ["quantize", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert (refused.exit_code, "nowhere" in refused.output) == (2, True)
    refused = CliRunner().invoke(app, ["quantize", str(made[0]), "--out", str(made[0])])
    assert (refused.exit_code, "is an artifact" in refused.output) == (2, True)


def test_an_unknown_field_and_a_changed_file_are_refused_by_name(made, tmp_path):
    folder, _ = made
    copy = tmp_path / "copy"
    for path in sorted(folder.rglob("*")):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    (copy / "serving.json").write_text("{}")
    assert "serving.json" in CliRunner().invoke(app, ["inspect", str(copy)]).output
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"colour": "red"}))
    assert "colour" in CliRunner().invoke(app, ["inspect", str(copy)]).output


def test_a_checkpoint_goes_through_layer_by_layer(made, tmp_path):
    checkpoint = made[0].parent / "tiny"
    words = ["quantize", str(checkpoint), "--stream", "--bits", "w4a8", "--out", str(tmp_path / "streamed")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "W4A8" in CliRunner().invoke(app, ["inspect", str(tmp_path / "streamed")]).output
    words = [*words[:-1], str(tmp_path / "other"), "--method", "smoothquant", "--calibration-samples", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "calibrating layer by layer" in done.output
    assert artifact.read_manifest(tmp_path / "other").calibration
    assert "vggt" in CliRunner().invoke(app, ["quantize", "demo-scene", "--stream", "--out", str(tmp_path)]).output


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_layers_get_the_format_that_their_pattern_asks_for_and_inspect_says_so(made, tmp_path, way):
    checkpoint, out = made[0].parent / "tiny", tmp_path / "out"
    words = ["quantize", str(checkpoint), *way, "--out", str(out), "--judging-samples", "0", "--bits", "w4a8"]
    words += ["--bits", "ffn.*=w8a8", "--bits", "time_proj=w8a8", "--keep", "blocks.0.attn2.*"]
    words += ["--bits", "blocks.1.ffn.net.2=fp8", "--bits", "blocks.1.attn1.*=w4afp8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = dict(offline.rows(artifact.read_manifest(out)))
    assert said["layers"] == "8 × W4A8, 4 × W8A8, 4 × W4AFP8, 1 × FP8, 4 kept in 16 bits"
    assert said["W8A8"] == "condition_embedder.time_proj, blocks.0-1.ffn.net.0.proj, blocks.0.ffn.net.2"
    assert said["FP8"] == "blocks.1.ffn.net.2"
    assert said["W4AFP8"] == ", ".join(f"blocks.1.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    assert said["16 bits"].startswith("blocks.0.attn2.to_q, blocks.0.attn2.to_k, ")
    manifest = json.loads((out / "manifest.json").read_text())
    formats = {name: layer["format"] for name, layer in manifest["layers"].items()}
    assert formats["condition_embedder.time_proj"] == "W8A8"
    assert formats["blocks.1.attn2.to_q"] == "W4A8"
    assert manifest["kept"] == [f"blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    film = load.load(out, "cpu").film(inputs(), nothing)
    assert film.frames.any()


def test_a_table_of_what_heads_choose_is_in_the_artifact_and_films_the_same_without_choosing(made, tmp_path):
    checkpoint, out = made[0].parent / "tiny", tmp_path / "out"
    words = ["quantize", str(checkpoint), "--method", "none", "--bits", "w16a16", "--calibration-samples", "1"]
    words += ["--judging-samples", "1", "--sparsity", "bands:0.5,block=16", "--table"]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    manifest = artifact.read_manifest(out)
    table = manifest.attention.policy.fields["table"]
    assert [len(letters) for letters in table] == [2, 2], "layers of two heads each"
    assert set("".join(table)) <= set("st")
    assert 0.4 < manifest.attention.sparse_density < 0.75
    assert "table=of 2 layers" in dict(offline.rows(manifest))["attention"]
    model = load.load(out, "cpu")
    assert model.attention.plan.policy == Bands(0.5, block=16, table=tuple(table))
    model.film(inputs(), nothing)
    ways = {layer: its.tolist() for (layer, _), its in model.attention._ways.items()}
    assert ways == {layer: [["st".index(letter) for letter in table[layer]]] for layer in (0, 1)}
    refused = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "other"), "--stream"])
    assert (refused.exit_code, "--stream does not make" in " ".join(refused.output.split())) == (2, True)


def test_a_lora_is_merged_with_its_scale_and_inspect_names_it(made, tmp_path):
    layer, path = "transformer.blocks.0.ffn.net.2", tmp_path / "style.safetensors"
    pair = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(24, 2)}
    save_file(pair, path)
    words = ["quantize", str(made[0].parent / "tiny"), "--stream", "--lora", f"{path}:0.5"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert ("merged", "style.safetensors × 0.5") in offline.rows(artifact.read_manifest(tmp_path / "out"))
    refused = CliRunner().invoke(app, [*words, "--lora", str(tmp_path / "none"), "--out", str(tmp_path / "other")])
    assert (refused.exit_code, "none is no safetensors file" in " ".join(refused.output.split())) == (2, True)


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_a_pattern_of_no_layer_is_named_beside_layers_that_there_are(made, tmp_path, way):
    words = ["quantize", str(made[0].parent / "tiny"), *way, "--out", str(tmp_path / "out"), "--keep", "block.0.*"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "'block.0.*'" in refused.output
    assert "blocks.0.attn1.to_q" in refused.output
    assert not list(tmp_path.iterdir())
