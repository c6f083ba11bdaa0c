"""Autoencoders that are read by us: they code and decode as diffusers' own loading has them do."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import autoencoders, convolutions, load
from models.video import index
from quant_runtime import artifact, wide_face
from quant_runtime.artifact import ArtifactError
from tests.models import films
from tests.models.films import CASES, RECIPES, apart, nothing

KINDS = {
    "wan-t2v": "AutoencoderKLWan",
    "wan-ti2v-5b": "AutoencoderKLWan",
    "hunyuan_video": "AutoencoderKLHunyuanVideo",
    "cogvideox": "AutoencoderKLCogVideoX",
}
FILE = f"{autoencoders.WEIGHTS}.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("autoencoders") / name for name in KINDS}
    for name, folder in folders.items():
        CASES[name].tiny(folder)
    return folders


@pytest.fixture
def every_layer_is_large(monkeypatch):
    monkeypatch.setattr(wide_face, "LEAST", 1)


@pytest.fixture(params=KINDS)
def given(request, checkpoints):
    """(folder, class) of an autoencoder."""
    kind = autoencoders.kinds(index(checkpoints[request.param]))["vae"]
    assert kind.__name__ == KINDS[request.param]
    return checkpoints[request.param] / "vae", kind


@pytest.fixture
def copied(given, tmp_path):
    folder, kind = given
    artifact.link_or_copy(folder, tmp_path / "copy")
    return tmp_path / "copy", kind


def rewrite(folder, change):
    tensors = {key: its.clone() for key, its in load_file(folder / FILE).items()}
    (folder / FILE).unlink()
    save_file(change(tensors), folder / FILE, metadata={"format": "pt"})


def answers(vae):
    """A film that is coded, and one that is decoded."""
    torch.manual_seed(0)
    seen = vae.config.get("in_channels", 3) if vae.config.get("patch_size") is None else 3
    film = torch.randn(1, seen, 9, 32, 32).to(vae.dtype)
    with torch.inference_mode():
        coded = vae.encode(film).latent_dist.mode()
        return coded, vae.decode(torch.randn(coded.shape).to(vae.dtype)).sample


def same(one, other):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(answers(one), answers(other), strict=True))


@pytest.mark.usefixtures("every_layer_is_large")
@pytest.mark.parametrize("onednn", [False, True])
def test_it_answers_bit_for_bit_what_it_answers_loaded_in_float32(given, onednn):
    """Every layer that has more than a vector, in 16 bits behind its face; through oneDNN as a worker has it or not."""
    folder, kind = given
    got, want = autoencoders.read(folder, kind, torch.float32, "cpu"), kind.from_pretrained(folder)
    want = want.float()
    assert got.dtype == torch.float32
    assert {its.dtype for its in got.parameters()} == {torch.float32}
    low = [its for its in got.modules() if hasattr(its, "behind")]
    assert {its.behind.dtype for its in low} == {torch.bfloat16}
    assert low == [its for its in got.modules() if isinstance(its, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    if onednn:
        for vae in (got, want):
            convolutions.by_onednn(vae)
    assert same(got, want)


@pytest.mark.usefixtures("every_layer_is_large")
def test_it_holds_what_its_file_has_in_16_bits_and_vectors_wider(given):
    folder, kind = given
    got = autoencoders.read(folder, kind, torch.float32, "cpu")
    low = [its for its in got.modules() if hasattr(its, "behind")]
    saved = [*got.parameters(), *(its.behind for its in low)]
    held = {its.untyped_storage().data_ptr(): its.untyped_storage().nbytes() for its in saved}
    stored = sum(its.nbytes for its in load_file(folder / FILE).values())
    filters = sum(its.behind.nbytes for its in low)
    assert sum(held.values()) == filters + 2 * (stored - filters) + 4 * len(low)


def test_in_bfloat16_it_is_what_diffusers_loads(given):
    folder, kind = given
    got = autoencoders.read(folder, kind, torch.bfloat16, "cpu")
    want = kind.from_pretrained(folder, dtype=torch.bfloat16)
    assert {name: its.dtype for name, its in got.state_dict().items()} == dict.fromkeys(want.state_dict(), want.dtype)
    assert same(got, want)


@pytest.mark.usefixtures("every_layer_is_large")
def test_stored_in_float32_nothing_is_rounded_and_nothing_has_a_face(copied):
    folder, kind = copied
    rewrite(folder, lambda tensors: {key: its.float() for key, its in tensors.items()})
    got = autoencoders.read(folder, kind, torch.float32, "cpu")
    assert not [its for its in got.modules() if hasattr(its, "behind")]
    assert same(got, kind.from_pretrained(folder, dtype=torch.float32))


def test_on_another_device_none_of_it_is_on_the_host(given):
    folder, kind = given
    for dtype in (torch.bfloat16, torch.float32):
        got = autoencoders.read(folder, kind, dtype, "meta")
        assert {(its.device.type, its.dtype) for its in got.state_dict().values()} == {("meta", dtype)}


def test_a_tensor_that_is_missing_is_named(copied):
    folder, kind = copied
    last = sorted(load_file(folder / FILE))[-1]
    rewrite(folder, lambda tensors: {key: its for key, its in tensors.items() if key != last})
    with pytest.raises(ValueError, match=last.replace(".", r"\.")):
        autoencoders.read(folder, kind, torch.float32, "cpu")


def test_names_and_files_that_only_diffusers_reads_are_left_to_it_with_a_line_in_the_log(copied, caplog):
    folder, kind = copied
    rewrite(folder, lambda tensors: tensors | {"of.another.version": torch.zeros(2)})
    with caplog.at_level(logging.WARNING, "models.autoencoders"):
        assert autoencoders.read(folder, kind, torch.float32, "cpu") is None
        (folder / FILE).unlink()
        assert autoencoders.read(folder, kind, torch.float32, "cpu") is None
    assert "of.another.version" in caplog.text
    assert f"has no {FILE}" in caplog.text


def test_an_artifact_whose_autoencoder_is_left_to_diffusers_films_the_same_and_is_hashed(checkpoints, tmp_path):
    case, folder = CASES["cogvideox"], checkpoints["cogvideox"]
    made = films.made(case.family, folder, RECIPES["w8a8"], tmp_path / "made", case.inputs(folder))
    asked = case.inputs(made.folder)
    want = load.load(made.folder, "cpu").film(asked, nothing).frames
    rewrite(made.folder / "vae", lambda tensors: tensors | {"of.another.version": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=f"vae/{FILE} is damaged"):
        load.load(made.folder, "cpu")
    assert apart(load.load(made.folder, "cpu", check=False).film(asked, nothing).frames, want) == 0


def test_they_are_those_of_an_index_that_are_models_of_diffusers(checkpoints):
    found = autoencoders.kinds(index(checkpoints["wan-t2v"]))
    assert found == {"transformer": diffusers.WanTransformer3DModel, "vae": diffusers.AutoencoderKLWan}
