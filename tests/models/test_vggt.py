import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file

from models import compress, load, registry, vggt
from models.base import BadInput, SceneInputs, VideoInputs
from models.compress import Recipe
from models.scene_files import CamerasFile
from models.vggt import POSE, Vggt, read_limits, views_of
from models.vggt_net import dense
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W4A8, W8A8, W16A16, QuantFormat
from quant_runtime.kernels._cpu import cpu_has_bfloat16
from quant_runtime.linear import QuantLinear
from quant_runtime.methods import METHODS, Rtn
from quant_runtime.residual import Residual
from quant_runtime.rules import Rule
from quant_runtime.sparsity.topk import TopK
from tests.models.films import SPARSE
from tests.support import relative_error

FLOAT32 = 1e-5  # what another order of the same sums costs
FAST = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
HALF = AttentionPlan(TopK(density=0.5, block=16))
RECIPES = {
    "none": ("w16a16", AttentionPlan()),
    "rtn": ("w8a8", AttentionPlan(dense_qk_bits=8)),
    "quarot": ("w4a8", HALF),
}
# Mean relative change of depth that a network of random weights, which damps no error, may show.
CHANGE = {"none": 0.02, "rtn": 0.03, "quarot": 0.4}


def ignored(done, of):
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vggt") / "tiny"
    Vggt().tiny(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(checkpoint):
    """Method → (folder, manifest), made as the command line makes them."""
    made = {}
    for method, (bits, plan) in RECIPES.items():
        recipe = Recipe(METHODS[method](), QuantFormat.parse(bits), plan)
        folder = checkpoint.parent / method
        made[method] = (
            folder,
            compress.compress(
                registry.family("vggt"),
                checkpoint,
                recipe,
                folder,
                base="tiny",
                device="cpu",
                on_progress=lambda *_: None,
            ),
        )
    return made


@pytest.fixture
def model(checkpoint):
    return Vggt().load(checkpoint, "cpu", torch.float32)


@pytest.fixture
def pictures(tmp_path):
    """A wide one and a square one, so that one is padded."""
    paths = []
    for name, size in (("wide.png", (120, 80)), ("square.png", (64, 64))):
        pixels = np.random.default_rng(len(paths)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        paths.append(tmp_path / name)
    return tuple(paths)


def test_a_residual_is_refused():
    with pytest.raises(ValueError, match="one step, which leaves no residual to another: leave it out"):
        Vggt().suits(torch.nn.Module(), AttentionPlan(TopK(), residual=Residual()))


def test_a_checkpoint_is_known_by_its_config(checkpoint, tmp_path):
    assert isinstance(registry.family_of(checkpoint), Vggt)
    (tmp_path / "config.json").write_text('{"patch_size": 2, "embed_dim": 3}')
    assert not Vggt().recognizes(tmp_path)
    assert not Vggt().recognizes(tmp_path / "nowhere")


def test_the_tiny_checkpoint_is_the_same_every_time(checkpoint, tmp_path):
    Vggt().tiny(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_attention_by_plan_is_the_networks_own_where_the_plan_is_dense(model):
    images = torch.rand(1, 3, 3, 56, 56)
    by_plan = model.predict(images, ignored)
    for block in model.net.aggregator.global_blocks:
        assert block.attn.attend is not dense
        block.attn.attend = dense
    plain = model.predict(images, ignored)
    assert relative_error(by_plan.pose, plain.pose) < FLOAT32
    assert relative_error(by_plan.depth, plain.depth) < FLOAT32


def test_sparse_attention_that_keeps_everything_is_dense_and_half_is_not(model):
    images = torch.rand(1, 3, 3, 56, 56)
    want = model.predict(images, ignored).depth
    model.attend(AttentionPlan(TopK(density=1.0, block=16), qk_bits=16))
    assert relative_error(model.predict(images, ignored).depth, want) < FLOAT32
    model.attend(replace(HALF, qk_bits=16))
    assert relative_error(model.predict(images, ignored).depth, want) > 100 * FLOAT32
    assert model.attention.density().effective < 0.6


@pytest.mark.parametrize("policy", SPARSE)
def test_a_scene_is_reconstructed_by_every_policy(model, policy):
    model.attend(SPARSE[policy])
    model.predict(torch.rand(1, 3, 3, 56, 56), ignored)  # refuses what is not finite
    assert 0 < model.attention.density().effective < 1


def test_the_blocks_linear_layers_shrink_and_no_other(model):
    names = model.layers()
    linear = {name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {"camera_head.embed_pose", "camera_head.poseLN_modulation.1"}
    assert linear - set(names) == left | {f"camera_head.pose_branch.fc{i}" for i in (1, 2)}
    assert len(names) == 4 * (1 + 4 + 4 + 1)


def test_an_artifact_without_a_method_holds_the_checkpoints_weights(checkpoint, artifacts):
    want, got = (load_file(folder / "model.safetensors") for folder in (checkpoint, artifacts["none"][0]))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("method", RECIPES)
def test_an_artifact_says_how_good_it_is_and_what_it_keeps(artifacts, method):
    _, manifest = artifacts[method]
    quality = manifest.quality
    assert set(quality) >= {"auc30", "auc30_full", "depth_absrel", "depth_absrel_full"}
    assert quality["depth_difference"] < CHANGE[method]
    assert manifest.attention.plan() == RECIPES[method][1]
    assert (manifest.attention.effective_density < 0.6) == (method == "quarot")
    assert manifest.serving["limits"]["max_views"] == 3


def test_numbers_are_as_wide_as_the_machine_is_fast_and_poses_are_float32(artifacts):
    for method, blocks in (("none", FAST), ("rtn", torch.float32)):
        net = load.load(artifacts[method][0], "cpu").net
        assert net.aggregator.frame_blocks[0].norm1.weight.dtype == blocks
        assert net.depth_head.scratch.layer1_rn.weight.dtype == FAST
        assert net.depth_head.scratch.layer1_rn.weight.is_contiguous(memory_format=torch.channels_last)
        assert net.depth_head.scratch.output_conv2[2].weight.dtype == torch.float32
        assert net.camera_head.pose_branch.fc2.weight.dtype == torch.float32
        assert isinstance(net.aggregator.frame_blocks[0].attn.qkv, QuantLinear) == (method == "rtn")


@pytest.mark.parametrize("method", RECIPES)
def test_pictures_become_files(artifacts, pictures, tmp_path, method):
    model, steps = load.load(artifacts[method][0], "cpu"), []
    out = tmp_path / "out"
    out.mkdir()
    outputs = model.run(SceneInputs(pictures), out, lambda done, of: steps.append((done, of)))
    assert steps == [(done, 7) for done in range(1, 8)]  # the encoder, four pairs, the camera head, the depth head

    names = {file.name for file in outputs.files}
    assert names == {
        "scene.glb", "scene.ply", "cameras.json", "scene.png", "depth-000.png", "depth-001.png", "run.json"
    }  # fmt: skip
    assert all(file.path == out / file.name and file.path.is_file() for file in outputs.files)
    record = json.loads((out / "run.json").read_text())
    assert record["views"] == 2
    assert record["points"] == len(trimesh.load(out / "scene.ply").vertices) > 0
    stages = [record["seconds"][name] for name in ("read", "encode", "aggregate", "heads", "write")]
    assert sum(stages) == pytest.approx(record["seconds"]["total"], abs=1e-3)
    assert record["attention"]["policy"]["name"] == ("topk" if method == "quarot" else "dense")
    assert record["kernels"] == model.kernels

    cameras = CamerasFile.model_validate_json((out / "cameras.json").read_text())
    first, second = cameras.views
    assert (first.file, first.width, first.height) == ("wide.png", 120, 80)
    assert np.allclose(np.array(first.extrinsics), np.eye(4)[:3], atol=1e-6)
    rotation = np.array(second.extrinsics)[:, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    with Image.open(out / first.depth.file) as depth:
        assert depth.size == (first.depth.width, first.depth.height) == (56, 42)  # 37 rows, rounded to patches


def test_only_the_files_asked_for_are_made(model, pictures, tmp_path):
    outputs = model.run(SceneInputs(pictures, formats=("ply",)), tmp_path, ignored)
    assert {file.name for file in outputs.files} == {"scene.ply", "scene.png", "run.json"}


def test_a_pixel_of_the_depth_map_and_its_place_in_the_picture_are_seen_along_one_ray(model, pictures):
    from models import vggt_images

    images, placements = vggt_images.load(pictures, 56, 14, "crop")
    views = views_of(pictures, images, placements, model.predict(images[None], ignored))
    for view, place in zip(views, placements, strict=True):
        rows, columns = place.visible(images.shape[-2:])
        assert view.depth.shape == view.pixels.shape[:2] == (rows.stop - rows.start, columns.stop - columns.start)
        row, column = 5, 9
        across = (column + columns.start - place.left + 0.5) * view.width / place.scaled_width - 0.5
        down = (row + rows.start - place.top + 0.5) * view.height / place.scaled_height - 0.5
        in_picture = np.linalg.solve(view.intrinsics, (across, down, 1))
        in_map = np.linalg.solve(view.depth_intrinsics, (column, row, 1))
        assert np.allclose(in_picture, in_map, atol=1e-6)


def test_raising_from_a_step_ends_the_run(model, pictures, tmp_path):
    class Stopped(Exception):
        pass

    seen = []

    def stop_at_three(done, of):
        seen.append(done)
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        model.run(SceneInputs(pictures), tmp_path, stop_at_three)
    assert seen == [1, 2, 3]
    assert not (tmp_path / "scene.glb").exists()


def test_what_can_never_work_is_refused_by_the_fields_name(model, pictures, tmp_path):
    long = tmp_path / "long.png"
    Image.new("RGB", (1000, 4)).save(long)
    video = VideoInputs("a cat", 64, 64, 5, 8, 2, 1.0, 0)
    for inputs, name in (
        (SceneInputs(pictures * 2), "images"),
        (SceneInputs(()), "images"),
        (SceneInputs((long,)), "images"),
        (SceneInputs(pictures, formats=("glb", "usd")), "formats"),
        (video, "artifact"),
    ):
        with pytest.raises(BadInput) as refused:
            model.run(inputs, tmp_path, ignored)
        assert refused.value.field == name


def test_a_network_that_answers_nonsense_makes_no_files(model, pictures, tmp_path):
    model.net.depth_head.scratch.output_conv2[2].bias[0] = torch.nan
    with pytest.raises(FloatingPointError):
        model.run(SceneInputs(pictures), tmp_path, ignored)
    assert not (tmp_path / "scene.glb").exists()


def test_the_truth_scores_full_marks_and_an_answer_is_as_far_from_it_as_it_is(model):
    outputs = model.outputs(2, ignored)
    assert outputs[0].shape == (2, 3, POSE + 56 * 56)
    assert outputs[0].dtype == torch.float32
    assert not torch.equal(outputs[0][1], outputs[1][1])
    truth = [scene[[1, 1]] for scene in outputs]
    perfect = Vggt().score(truth, outputs)
    assert perfect["auc30"] == 100
    assert perfect["depth_absrel"] == 0
    assert perfect["pose_difference"] > 0
    same = Vggt().score(outputs, outputs)
    assert same["auc30"] == same["auc30_full"] < 100
    assert same["depth_absrel"] == same["depth_absrel_full"] > 0
    assert same["pose_difference"] < 1e-3
    assert same["depth_difference"] == 0


def test_limits_come_with_the_checkpoint_and_a_misspelled_one_is_named(tmp_path):
    assert read_limits(Path(tmp_path)).max_views == 100
    (tmp_path / "serving.json").write_text('{"limits": {"max_views": 5}}')
    assert read_limits(tmp_path).max_views == 5
    (tmp_path / "serving.json").write_text('{"limits": {"max_viws": 5}}')
    with pytest.raises(ValueError, match="max_viws"):
        read_limits(tmp_path)


def test_on_a_cpu_the_camera_head_runs_the_artifact_s_weights_without_int8(artifacts):
    folder, manifest = artifacts["quarot"]
    opened = load.load(folder, "cpu")
    low = [name for name, layer in opened.network.named_modules() if isinstance(layer, QuantLinear)]
    camera = [name for name in manifest.layers if name.startswith("camera_head.")]
    assert camera
    assert sorted(low) == sorted(manifest.layers.keys() - set(camera))
    assert "camera head" in opened.kernels


def test_a_camera_head_of_large_layers_stays_int8_for_it_would_be_four_times_as_large(artifacts, monkeypatch):
    folder, manifest = artifacts["quarot"]
    monkeypatch.setattr(vggt, "LARGE", 1)
    opened = load.load(folder, "cpu")
    low = {name for name, layer in opened.network.named_modules() if isinstance(layer, QuantLinear)}
    assert low == manifest.layers.keys()


def test_its_layers_get_formats_of_their_own_inside_the_blocks_and_behind_them(checkpoint, pictures, tmp_path):
    rules = (Rule("frame_blocks.0.*", W16A16), Rule("mlp.*", W8A8), Rule("pose_branch.fc1", W8A8))
    recipe = Recipe(Rtn(), W4A8, judging_samples=0, rules=rules)
    words = {"base": "tiny", "device": "cpu", "on_progress": lambda *_: None}
    made = compress.compress(registry.family("vggt"), checkpoint, recipe, tmp_path / "out", **words)
    formats = {name: layer.format for name, layer in made.layers.items()}
    assert formats["aggregator.frame_blocks.1.attn.qkv"] == "W4A8"
    assert formats["aggregator.frame_blocks.0.mlp.fc1"] == "W8A8"
    assert formats["camera_head.pose_branch.fc1"] == "W8A8"
    assert made.kept == tuple(f"aggregator.frame_blocks.0.attn.{name}" for name in ("qkv", "proj"))
    outputs = load.load(tmp_path / "out", "cpu").run(SceneInputs(images=pictures), tmp_path, ignored)
    assert outputs.files
