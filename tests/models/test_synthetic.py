import hashlib
import inspect
import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from models import load, registry, stream, synthetic, tiny
from models.published import PARTS, PUBLISHED
from models.wan import Wan
from quant_runtime import artifact
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W4A8
from quant_runtime.methods import Rtn
from tests.models import films
from tests.models.synthetics import NAME, WAN, index_of, nothing

SAMPLED = 0.1  # of a deviation: of 128 numbers it is drawn to 6 %


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    synthetic.write(WAN, folder, nothing)
    return folder


@pytest.fixture(scope="module")
def tensors(made):
    return {
        key: tensor for file in (made / "transformer").glob("*.safetensors") for key, tensor in load_file(file).items()
    }


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "transformer").iterdir()}


def test_its_folder_is_as_the_hub_has_one(made, tensors):
    assert sorted(path.name for path in made.iterdir()) == ["model_index.json", "transformer"]
    files = sorted(path.name for path in (made / "transformer").glob("*.safetensors"))
    assert files == [f"{NAME}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    index = index_of(made / "transformer")
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert registry.family_of(made).name == "wan"


def test_its_tensors_are_those_of_the_network_in_the_type_that_is_published(tensors):
    own = WAN.on_meta().state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        key: tuple(its.shape) for key, its in own.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_no_file_is_larger_than_is_asked(made):
    for file in (made / "transformer").glob("*.safetensors"):
        assert sum(t.numel() * t.element_size() for t in load_file(file).values()) <= WAN.shard_bytes


def test_the_same_seed_gives_the_same_bytes_and_another_others(made, tmp_path):
    synthetic.write(WAN, tmp_path / "again", nothing)
    synthetic.write(WAN, tmp_path / "other", nothing, seed=1)
    assert hashes(tmp_path / "again") == hashes(made)
    same = hashes(tmp_path / "other").items() & hashes(made).items()
    assert not [name for name, _ in same if name.endswith(".safetensors")]


def test_one_input_channel_in_64_is_an_outlier_and_the_rest_is_of_its_layer_s_scale(tensors):
    weight = tensors["blocks.0.attn1.to_q.weight"].float()  # 128 inputs
    spread = weight.std(dim=0) * 128**0.5
    assert ((spread - synthetic.OUTLIER).abs() < SAMPLED * 3 * synthetic.OUTLIER).sum() == 2
    assert ((spread - 1).abs() < 3 * SAMPLED).sum() == 126


def test_no_row_comes_twice(tensors):
    rows = torch.cat([tensor for key, tensor in tensors.items() if key.endswith(("to_q.weight", "to_k.weight"))])
    assert len(rows.unique(dim=0)) == len(rows) == 8 * 128


def test_values_that_go_around_the_pool_go_on_behind_its_end():
    pool = torch.arange(10.0)
    long = synthetic._around(pool, 8, synthetic.Blank(torch.float32, (23,)))
    assert long.tolist() == [(8 + i) % 10 for i in range(23)]


def test_gains_are_around_one_and_biases_around_zero(tensors):
    assert abs(float(tensors["blocks.0.attn1.norm_q.weight"].float().mean()) - 1) < synthetic.AROUND
    assert abs(float(tensors["blocks.0.attn1.to_q.bias"].float().mean())) < synthetic.AROUND


def test_a_folder_that_is_there_is_left_alone(made):
    before = hashes(made)
    with pytest.raises(FileExistsError, match="choose another name"):
        synthetic.write(WAN, made, nothing, seed=1)
    assert hashes(made) == before


def test_a_disk_without_room_is_known_before_the_first_tensor(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"[\d,]+ bytes are to be written and 1,000 are free"):
        synthetic.write(WAN, tmp_path / "checkpoint", lambda done, of: seen.append(done))
    assert not seen
    assert not list(tmp_path.iterdir())


def test_what_was_begun_and_not_ended_leaves_nothing(tmp_path):
    def stop(done, of):
        if done > of / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        synthetic.write(WAN, tmp_path / "checkpoint", stop)
    assert not list(tmp_path.iterdir())


def test_every_byte_is_told(tmp_path):
    told = []
    synthetic.write(replace(WAN, dtype=torch.bfloat16), tmp_path / "c", lambda done, of: told.append((done, of)))
    index = json.loads((tmp_path / "c" / "transformer" / f"{NAME}.safetensors.index.json").read_text())
    assert told[-1] == (index["metadata"]["total_size"],) * 2


def test_two_experts_come_in_two_folders_and_are_not_the_same(tmp_path):
    told = []
    published = replace(WAN, networks=2, index={"boundary_ratio": 0.875})
    synthetic.write(published, tmp_path / "c", lambda done, of: told.append((done, of)))
    assert json.loads((tmp_path / "c" / "model_index.json").read_text())["boundary_ratio"] == 0.875
    names = ("transformer", "transformer_2")
    assert registry.family("wan").components(tmp_path / "c") == names
    first, second = (load_file(min((tmp_path / "c" / name).glob("*.safetensors"))) for name in names)
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[key], second[key]) for key in first)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_checkpoint_is_one_that_its_family_compresses(tmp_path, monkeypatch, name):
    """Its configs, without weights."""

    def empty(network, folder, *_):
        folder.mkdir()
        network.save_config(folder)

    monkeypatch.setattr(synthetic, "write_network", empty)
    synthetic.write(PUBLISHED[name], tmp_path / "c", nothing)
    family = registry.family_of(tmp_path / "c")
    assert family.name == PUBLISHED[name].family
    family.check(tmp_path / "c")
    assert len(family.components(tmp_path / "c")) == PUBLISHED[name].networks


def test_it_becomes_an_artifact_layer_by_layer(made, tmp_path):
    words = {"base": "synthetic", "device": "cpu", "on_bytes": nothing}
    manifest = stream.compress(registry.family("wan"), made, Rtn(), W4A8, AttentionPlan(), tmp_path / "out", **words)
    assert artifact.verify(tmp_path / "out") == manifest
    assert len(manifest.layers) == 20


@pytest.mark.parametrize("family", [*PARTS])
def test_with_all_parts_at_their_sizes_it_is_a_checkpoint_of_the_hub_s_names(family, tmp_path, monkeypatch):
    """Here smaller ones."""
    small = {"vocab_size": 900, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "projection_dim": 32}
    coded = {"block_out_channels": (32, 32, 32, 32), "base_dim": 8}
    parts = {}
    for name, part in PARTS[family].items():
        taken = inspect.signature(getattr(diffusers, part.kind)).parameters if name == "vae" else part.config
        parts[name] = replace(part, config={**part.config, **{k: v for k, v in (small | coded).items() if k in taken}})
    network = next(its for its in PUBLISHED.values() if its.family == family)
    narrow = {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "ffn_dim": 64, "num_refiner_layers": 1}
    its = inspect.signature(getattr(diffusers, network.network)).parameters
    network = replace(network, config={**network.config, **{k: v for k, v in narrow.items() if k in its}})
    folder = tmp_path / "full"
    synthetic.write_full(network, parts, folder, nothing)
    for name, part in parts.items():
        kind = getattr(diffusers, part.kind, None) or getattr(transformers, part.kind)
        made = kind.from_pretrained(folder / name, dtype=torch.bfloat16)
        files = (folder / name).glob("*.safetensors")
        assert {its.dtype for file in files for its in load_file(file).values()} == {torch.bfloat16}
        assert all(getattr(made.config, key) == value for key, value in part.config.items() if key in small)
    words = {"base": "synthetic", "device": "cpu", "on_bytes": nothing}
    stream.compress(registry.family(family), folder, Rtn(), W4A8, AttentionPlan(), tmp_path / "out", **words)
    load.load(tmp_path / "out", "cpu")
    with pytest.raises(FileExistsError, match="choose another name"):
        synthetic.write_full(network, parts, folder, nothing)


def test_two_networks_that_take_turns_are_not_made_whole(tmp_path):
    with pytest.raises(ValueError, match="of one network"):
        synthetic.write_full(PUBLISHED["wan-2.2-t2v-a14b"], PARTS["wan"], tmp_path / "full", nothing)


def test_with_small_parts_around_it_it_runs(tmp_path):
    synthetic.write_whole(WAN, tmp_path / "whole", tiny.LIMITS, nothing)
    model = Wan().load(tmp_path / "whole", "cpu", torch.float32)
    assert len(model.network.blocks) == WAN.config["num_layers"]
    assert model.network.blocks[0].ffn.net[2].in_features == WAN.config["ffn_dim"]
    assert model.film(films.inputs(width=96, height=64), nothing).frames.shape == (9, 64, 96, 3)
    with pytest.raises(FileExistsError, match="choose another name"):
        synthetic.write_whole(WAN, tmp_path / "whole", tiny.LIMITS, nothing)
    with pytest.raises(ValueError, match="got hunyuan_video"):
        synthetic.write_whole(PUBLISHED["hunyuan-video"], tmp_path / "other", tiny.LIMITS, nothing)
