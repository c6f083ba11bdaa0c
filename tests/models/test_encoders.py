"""Text and image encoders that are read by us: they answer what transformers' own loading answers."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, T5EncoderModel

from models import encoders, load
from models.cogvideox import CogVideoX
from models.video import index
from quant_runtime import artifact, wide_face
from quant_runtime.artifact import ArtifactError
from quant_runtime.wide_face import FacedEmbedding, FacedLinear
from tests.models import films
from tests.models.films import CASES, RECIPES, apart, nothing

KINDS = {  # of each that is published
    ("wan-t2v", "text_encoder"): "UMT5EncoderModel",
    ("wan-i2v", "text_encoder"): "UMT5EncoderModel",
    ("wan-i2v", "image_encoder"): "CLIPVisionModel",
    ("hunyuan_video", "text_encoder"): "LlamaModel",
    ("hunyuan_video", "text_encoder_2"): "CLIPTextModel",
    ("cogvideox", "text_encoder"): "T5EncoderModel",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {}
    for name, _ in KINDS:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("encoders") / name
            CASES[name].tiny(folders[name])
    return folders


@pytest.fixture
def every_layer_is_large(monkeypatch):
    monkeypatch.setattr(wide_face, "LEAST", 1)


@pytest.fixture(params=KINDS, ids="-".join)
def given(request, checkpoints):
    """(folder, class) of an encoder."""
    name, part = request.param
    kind = encoders.kinds(index(checkpoints[name]))[part]
    assert kind.__name__ == KINDS[request.param]
    return checkpoints[name] / part, kind


@pytest.fixture
def copied(given, tmp_path):
    folder, kind = given
    artifact.link_or_copy(folder, tmp_path / "copy")
    return tmp_path / "copy", kind


def rewrite(folder, change):
    """Its tensors as `change` has them, in a file of their own."""
    path = folder / "model.safetensors"
    tensors = {key: its.clone() for key, its in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path, metadata={"format": "pt"})


def answers(encoder):
    """Of texts of two lengths, or of pictures: all hidden states."""
    torch.manual_seed(0)
    if isinstance(encoder, CLIPVisionModel):
        asked = {"pixel_values": torch.randn(2, 3, 28, 28).to(encoder.dtype)}
    else:
        ids = torch.randint(3, encoder.config.vocab_size, (2, 11))
        asked = {"input_ids": ids, "attention_mask": (torch.arange(11) < torch.tensor([[11], [7]])).long()}
    with torch.inference_mode():
        out = encoder(**asked, output_hidden_states=True)
    return [out.last_hidden_state, *out.hidden_states]


def same(one, other):
    pairs = zip(answers(one), answers(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("every_layer_is_large")
def test_it_answers_bit_for_bit_what_it_answers_loaded_in_float32(given):
    """Of one chunk of channels. And to all who ask, it is in float32."""
    folder, kind = given
    got = encoders.read(folder, kind, torch.float32, "cpu")
    assert got.dtype == torch.float32
    low = [its for its in got.modules() if isinstance(its, (FacedLinear, FacedEmbedding))]
    assert {type(its) for its in low} == {FacedLinear, FacedEmbedding}
    assert not [its for its in got.modules() if type(its) in (torch.nn.Linear, torch.nn.Embedding)]
    assert {its.behind.dtype for its in low} == {torch.bfloat16}
    assert {its.dtype for its in got.parameters()} == {torch.float32}
    assert same(got, kind.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.usefixtures("every_layer_is_large")
def test_it_holds_what_its_file_has_in_16_bits_and_small_ones_wider(given):
    folder, kind = given
    got = encoders.read(folder, kind, torch.float32, "cpu")
    stored = load_file(folder / "model.safetensors")
    large = sum(its.nbytes for its in stored.values() if its.dim() >= 2)
    others = sum(2 * its.nbytes for its in stored.values() if its.dim() < 2)
    faces = 4 * sum(hasattr(its, "behind") for its in got.modules())
    saved = [*got.parameters(), *(its.behind for its in got.modules() if hasattr(its, "behind"))]
    held = {its.untyped_storage().data_ptr(): its.untyped_storage().nbytes() for its in saved}
    assert sum(held.values()) == large + others + faces, "what is tied is there once"


def test_in_bfloat16_it_is_what_transformers_loads(given):
    folder, kind = given
    got, want = encoders.read(folder, kind, torch.bfloat16, "cpu"), kind.from_pretrained(folder, dtype=torch.bfloat16)
    types = [{name: its.dtype for name, its in one.state_dict().items()} for one in (got, want)]
    assert types[0] == types[1]
    assert same(got, want)


@pytest.mark.usefixtures("every_layer_is_large")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_otherwise_it_answers_the_same_and_what_is_wide_stays_wide(copied, dtype):
    folder, kind = copied
    rewrite(folder, lambda tensors: {key: its.to(dtype) for key, its in tensors.items()})
    got = encoders.read(folder, kind, torch.float32, "cpu")
    low = [its for its in got.modules() if isinstance(its, (FacedLinear, FacedEmbedding))]
    assert {its.behind.dtype for its in low} == ({dtype} if dtype == torch.float16 else set())
    assert same(got, kind.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.usefixtures("every_layer_is_large")
def test_in_shards_it_is_the_same(given, tmp_path):
    folder, kind = given
    kind.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    got = encoders.read(tmp_path / "shards", kind, torch.float32, "cpu")
    assert same(got, kind.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.usefixtures("every_layer_is_large")
def test_names_with_the_prefix_of_their_kind_and_places_as_hub_folders_have_them_are_known(copied):
    """CLIP's files of years ago: `text_model.` before all names, and the numbers of the places."""
    folder, kind = copied
    want = kind.from_pretrained(folder, dtype=torch.float32)
    prefix, useless = kind.base_model_prefix, {name for name, _ in want.named_buffers()} - want.state_dict().keys()
    places = {f"{prefix}.{name}": torch.arange(9) for name in useless}
    rewrite(folder, lambda tensors: {f"{prefix}.{key}": its for key, its in tensors.items()} | places)
    digests = {"model.safetensors": artifact._record(folder / "model.safetensors").sha256}
    assert same(encoders.read(folder, kind, torch.float32, "cpu", digests), want)


def test_a_tensor_that_is_missing_is_named(copied):
    folder, kind = copied
    last = sorted(load_file(folder / "model.safetensors"))[-1]
    rewrite(folder, lambda tensors: {key: its for key, its in tensors.items() if key != last})
    with pytest.raises(ValueError, match=last.replace(".", r"\.")):
        encoders.read(folder, kind, torch.float32, "cpu")


def test_one_of_another_shape_is_named(copied):
    folder, kind = copied
    first = sorted(load_file(folder / "model.safetensors"))[0]
    rewrite(folder, lambda tensors: tensors | {first: torch.zeros(3, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=first.replace(".", r"\.")):
        encoders.read(folder, kind, torch.float32, "cpu")


@pytest.fixture(scope="module")
def compressed(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts") / "made"
    case = CASES["cogvideox"]
    return films.made(
        case.family, checkpoints["cogvideox"], RECIPES["w8a8"], out, case.inputs(checkpoints["cogvideox"])
    )


def test_a_changed_byte_of_an_encoder_is_refused_by_the_file_s_name(compressed, tmp_path):
    artifact.link_or_copy(compressed.folder, tmp_path / "copy")
    rewrite(tmp_path / "copy" / "text_encoder", lambda tensors: tensors | {"shared.weight": -tensors["shared.weight"]})
    with pytest.raises(ArtifactError, match=r"text_encoder/model\.safetensors is damaged"):
        load.load(tmp_path / "copy", "cpu")
    load.load(tmp_path / "copy", "cpu", check=False)


def test_names_that_only_transformers_reads_are_left_to_it_with_a_line_in_the_log(compressed, tmp_path, caplog):
    """Hashed all the same, before it reads them."""
    folder = tmp_path / "copy"
    artifact.link_or_copy(compressed.folder, folder)
    rewrite(folder / "text_encoder", lambda tensors: tensors | {"of.another.version": torch.zeros(2)})
    name = "text_encoder/model.safetensors"
    manifest = artifact.read_manifest(folder)
    files = manifest.files | {name: artifact._record(folder / name)}
    (folder / artifact.MANIFEST).unlink()
    text = manifest.model_copy(update={"files": files}).model_dump_json()
    (folder / artifact.MANIFEST).write_text(text)
    with caplog.at_level(logging.WARNING, "models.encoders"):
        got, want = load.load(folder, "cpu"), load.load(compressed.folder, "cpu")
    said = [record.getMessage() for record in caplog.records if record.name == "models.encoders"]
    assert len(said) == 1
    assert "of.another.version" in said[0]
    asked = CASES["cogvideox"].inputs(folder)
    assert apart(got.film(asked, nothing).frames, want.film(asked, nothing).frames) == 0
    wrong = json.loads(text)
    wrong["files"][name]["sha256"] = "0" * 64
    (folder / artifact.MANIFEST).write_text(json.dumps(wrong))
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        load.load(folder, "cpu")


def test_weights_in_no_safetensors_are_left_to_transformers_with_a_line_in_the_log(copied, caplog):
    folder, kind = copied
    (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "models.encoders"):
        assert encoders.read(folder, kind, torch.float32, "cpu") is None
    assert "has no model.safetensors" in caplog.text


def test_they_are_those_of_an_index_that_are_models_of_transformers_and_hashed_as_they_are_read(checkpoints):
    assert CogVideoX().hashed(checkpoints["cogvideox"]) == ("transformer", "text_encoder", "vae")
    assert encoders.kinds(index(checkpoints["cogvideox"])) == {"text_encoder": T5EncoderModel}
