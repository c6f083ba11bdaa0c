"""How a pipeline's transformer is loaded: as diffusers loads it, and strictly. Where its residual goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from models import compress, registry, stream, synthetic, video
from models.base import BadInput, NoRoom
from models.compress import Recipe
from models.wan import Wan
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W8A8
from quant_runtime.memory import Room
from quant_runtime.methods import Rtn
from quant_runtime.residual import Residual
from quant_runtime.sparsity.topk import TopK
from tests.models.films import inputs
from tests.models.synthetics import NAME, WAN, nothing, renamed, shard_of

KEY = "blocks.1.ffn.net.2.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole small checkpoint of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("wan", "hunyuan_video", "cogvideox"):
        registry.family(name).tiny(folder / name)
    return folder


@pytest.fixture
def sharded(tiny, tmp_path):
    """The small Wan with a synthetic transformer under the hub's names."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny / "wan", folder)
    shutil.rmtree(folder / "transformer")
    network = Wan().skeleton(tiny / "wan")
    synthetic.write_network(network, folder / "transformer", torch.bfloat16, 20_000, 0, nothing)
    assert len(list((folder / "transformer").glob(f"{NAME}-*-of-*.safetensors"))) > 2
    return folder


def same(one, other):
    """Parameters and buffers, those that no file holds too."""
    a, b = ({**dict(network.named_parameters()), **dict(network.named_buffers())} for network in (one, other))
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_a_transformer_is_loaded_as_diffusers_loads_it(tiny, name, dtype):
    family = registry.family(name)
    got = family.network(tiny / name, "transformer", "cpu", dtype)
    assert same(got, family.transformer.from_pretrained(tiny / name, subfolder="transformer", dtype=dtype))
    assert not got.training
    assert not any(parameter.requires_grad for parameter in got.parameters())


def test_places_that_no_file_holds_are_there(tiny, tmp_path):
    """CogVideoX 2B adds its places to the tokens, and computes them."""
    config = CogVideoXTransformer3DModel.load_config(tiny / "cogvideox" / "transformer")
    network = CogVideoXTransformer3DModel.from_config(config | {"use_rotary_positional_embeddings": False})
    network.save_pretrained(tmp_path / "transformer")
    got = registry.family("cogvideox").network(tmp_path, "transformer", "cpu", torch.float32)
    assert got.patch_embed.pos_embedding.abs().sum() > 0
    assert same(got, network)


def test_a_sharded_checkpoint_under_the_hub_s_names_is_loaded_whole(sharded):
    network = Wan().load(sharded, "cpu", torch.float32).network
    stock = Wan.transformer.from_pretrained(sharded, subfolder="transformer", dtype=torch.float32)
    assert same(network, stock)


def test_a_renamed_key_is_named(sharded):
    renamed(sharded / "transformer", KEY, "blocks.1.ffn.net.3.weight")
    said = rf"missing: \['{KEY}'\]; tensors of no layer: \['blocks.1.ffn.net.3.weight'\]"
    with pytest.raises(ValueError, match=said):
        Wan().load(sharded, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_every_family_loads_its_shards_whole_and_names_a_key_that_was_renamed(tiny, name, tmp_path):
    family, folder = registry.family(name), tmp_path / "sharded"
    shutil.copytree(tiny / name, folder)
    shutil.rmtree(folder / "transformer")
    network = family.skeleton(tiny / name)
    synthetic.write_network(network, folder / "transformer", torch.bfloat16, 20_000, 0, nothing)
    assert len(list((folder / "transformer").glob(f"{NAME}-*-of-*.safetensors"))) > 2
    stock = family.transformer.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
    assert same(family.load(folder, "cpu", torch.float32).network, stock)
    key = family.linears(network)[-1]
    renamed(folder / "transformer", f"{key}.weight", f"{key}.wait")
    with pytest.raises(ValueError, match=rf"missing: \['{key}.weight'\]; tensors of no layer: \['{key}.wait'\]"):
        family.load(folder, "cpu", torch.float32)


def test_a_shard_that_is_missing_or_cut_off_is_named(sharded):
    file = shard_of(sharded / "transformer", KEY)
    data = file.read_bytes()
    file.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=rf"{file.name} has .* it is not whole"):
        Wan().load(sharded, "cpu", torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}, which is not there"):
        Wan().load(sharded, "cpu", torch.float32)


def test_a_tensor_of_another_shape_is_named(sharded):
    path = sharded / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 40}))
    with pytest.raises(ValueError, match=r"ffn\.net\.0\.proj\.weight is .* the network has .* \[40, "):
        Wan().load(sharded, "cpu", torch.float32)


def test_a_folder_that_holds_its_transformer_alone_is_no_pipeline(tmp_path):
    synthetic.write(WAN, tmp_path / "c", nothing)
    said = r"c is no whole WanPipeline: its model_index.json has no tokenizer, text_encoder, vae, scheduler\..*--stream"
    with pytest.raises(ValueError, match=said):
        Wan().load(tmp_path / "c", "cpu", torch.float32)


RESIDUAL = Residual(1, rank=4)


def with_residual(tiny, **fields):
    model = Wan().load(tiny / "wan", "cpu", torch.float32)
    model.attend(AttentionPlan(TopK(0.5, block=16), residual=replace(RESIDUAL, **fields)))
    return model


@pytest.mark.parametrize(("place", "placed"), [("device", "device"), ("auto", "device"), ("host", "host")])
def test_a_residual_goes_where_the_plan_says_while_there_is_room(tiny, place, placed, tmp_path):
    model = with_residual(tiny, place=place)
    outputs = model.run(inputs(), tmp_path, nothing)
    assert outputs.cached == {placed: model.attention.density().residual.bytes}
    record = json.loads((tmp_path / "run.json").read_text())["attention"]["residual"]
    assert (record["place"], record["placed"], record["bytes"]) == (place, placed, outputs.cached[placed])
    assert [refresh["step"] for refresh in record["refreshes"]] == [0], "the other step is sparse"
    assert record["refreshes"][0]["lost"] > 0


def needs(model, asked):
    """Of the device, for the residual and for a step."""
    config = model.network.config
    width = config.num_attention_heads * config.attention_head_dim
    return model.residual_bytes(asked) + video.STEP_TENSORS * 2 * model.expected(asked).tokens * width * 2


PLENTY = Room(2**60, 2**60)


def test_a_residual_that_has_no_room_goes_to_the_host_where_it_may_and_is_refused_where_it_may_not(tiny, monkeypatch):
    model, asked = with_residual(tiny), inputs()
    needed = needs(model, asked)
    monkeypatch.setattr(video, "host_room", lambda: PLENTY)
    monkeypatch.setattr(video, "room", lambda device: Room(needed, needed))
    assert model.place(asked) == "device"
    monkeypatch.setattr(video, "room", lambda device: Room(needed - 1, needed - 1))
    with pytest.raises(BadInput, match=r"GiB are free beside the weights: take fewer frames .* --residual-place auto"):
        model.film(asked, nothing)
    model.place(inputs(frames=5))  # there is room for that
    assert with_residual(tiny, place="auto").place(asked) == "host"
    assert with_residual(tiny, place="host").place(asked) == "host"


def test_a_film_whose_passes_are_recorded_needs_room_for_what_lies_within_one_besides(tiny, monkeypatch):
    model, asked = with_residual(tiny), inputs()
    needed = needs(model, asked)
    step = needed - model.residual_bytes(asked)  # a recorded pass holds as much as one that refreshes
    model.launch_as_one()
    monkeypatch.setattr(video, "room", lambda device: Room(needed + step, needed + step))
    assert model.place(asked) == "device"
    monkeypatch.setattr(video, "room", lambda device: Room(needed + step - 1, needed + step - 1))
    with pytest.raises(BadInput, match="are free beside the weights"):
        model.film(asked, nothing)
    monkeypatch.setattr(video, "MOST_TOKENS", model.expected(asked).tokens - 1)  # of more tokens none is recorded
    monkeypatch.setattr(video, "room", lambda device: Room(needed, needed))
    assert model.place(asked) == "device"


@pytest.mark.parametrize("place", ["host", "auto"])
def test_a_residual_that_the_host_has_no_room_for_is_refused_by_the_film_s_frames(tiny, monkeypatch, place):
    model, asked = with_residual(tiny, place=place), inputs()
    pinned = model.residual_bytes(asked, pinned=True)
    assert pinned > model.residual_bytes(asked), "torch rounds it up"
    monkeypatch.setattr(video, "room", lambda device: Room(0, 0))
    monkeypatch.setattr(video, "host_room", lambda: Room(pinned, pinned))
    assert model.place(asked) == "host"
    monkeypatch.setattr(video, "host_room", lambda: Room(pinned - 1, pinned - 1))
    with pytest.raises(BadInput, match=r"GiB of the host .*: take fewer frames .* with --residual-bits 8") as error:
        model.film(asked, nothing)
    assert error.value.field == "frames"


def test_what_only_this_moment_has_no_room_for_may_be_asked_again(tiny, monkeypatch):
    asked = inputs()
    needed, pinned = needs(with_residual(tiny), asked), with_residual(tiny).residual_bytes(asked, pinned=True)
    full, never = Room(needed - 1, needed), Room(needed - 1, needed - 1)
    host_full, host_never = Room(pinned - 1, pinned), Room(pinned - 1, pinned - 1)
    for place, card, host, error in (
        ("device", full, PLENTY, NoRoom), ("host", never, host_full, NoRoom), ("auto", never, host_full, NoRoom),
        ("auto", full, host_never, NoRoom), ("auto", never, host_never, BadInput),
    ):  # fmt: skip
        monkeypatch.setattr(video, "room", lambda device, card=card: card)
        monkeypatch.setattr(video, "host_room", lambda host=host: host)
        with pytest.raises(error):
            with_residual(tiny, place=place).place(asked)


def test_a_plan_that_cannot_run_is_refused_before_anything_is_read_or_written(tiny, tmp_path):
    recipe = Recipe(Rtn(), W8A8, AttentionPlan(TopK(), residual=Residual(rank=64)))
    words = {"base": "tiny", "device": "cpu"}
    with pytest.raises(ValueError, match="at most the size of this model's heads"):
        compress.compress(
            Wan(), tiny / "wan", recipe, tmp_path / "out", on_progress=lambda *_: pytest.fail("too late"), **words
        )
    given = (Rtn(), W8A8, recipe.attention, tmp_path / "out")
    with pytest.raises(ValueError, match="at most the size of this model's heads"):
        stream.compress(Wan(), tiny / "wan", *given, on_bytes=lambda *_: pytest.fail("too late"), **words)
    assert list(tmp_path.iterdir()) == []
