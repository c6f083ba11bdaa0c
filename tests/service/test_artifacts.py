from __future__ import annotations

import json

import pytest

from service.artifacts import find, read
from service.settings import StartError
from tests.service.support import film, room, write_artifact


def test_a_manifest_tells_the_artifact(tmp_path):
    folder = write_artifact(tmp_path / "a", film())
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    info = read(folder).info
    assert info.bytes == 1000 + (folder / "manifest.json").stat().st_size
    assert info.model_copy(update={"bytes": film().bytes}) == film()


def test_what_serving_does_not_need_is_left_to_the_loader(tmp_path):
    folder = write_artifact(tmp_path / "My film, 2", film())
    manifest = json.loads((folder / "manifest.json").read_text())
    for field in ("name", "density", "bits"):
        del manifest[field]
    manifest |= {
        "runtime": "quant_runtime 0.1.0",
        "method": {"name": "smoothquant", "fields": {"alpha": 0.5}},
        "layers": {f"blocks.{i}": {"format": "W8A8" if i == 0 else "W4A8", "bytes": 9} for i in range(3)},
        "attention": {
            "policy": {"name": "topk"},
            "effective_density": 0.3,
            "residual": {"interval": 5, "bytes": 4096, "placed": "host"},
        },
        "files": {},
    }
    manifest["serving"]["guidance_scale"] = "the family's own"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    info = read(folder).info
    assert (info.name, info.method, info.bits, info.density) == ("My-film-2", "smoothquant", "W4A8", 0.3)
    assert info.cache_bytes == 4096


@pytest.mark.parametrize(
    ("attention", "took"),
    [({"residual": {"interval": 5, "bytes": None}}, None), ({"residual": {"interval": 5}}, None), ({}, 0), (None, 0)],
)
def test_what_a_cache_takes_is_null_where_no_film_has_measured_it_and_none_where_there_is_no_residual(
    tmp_path, attention, took
):
    folder = write_artifact(tmp_path / "a", film())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"attention": attention}))
    assert read(folder).info.cache_bytes == took


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"serving": {"kind": "video", "limits": {"size_multiple": 16}}}, "max_pixels"),
        ({"serving": {"kind": "audio", "limits": {}}}, "kind"),
        ({"serving": {"kind": "scene", "limits": {"views": 4}}}, "views"),
        ({"serving": None}, "serving"),
        ({"density": 2}, "density"),
        ({"name": "a/b"}, "name"),
        ({"family": None}, "family"),
    ],
)
def test_a_manifest_that_cannot_be_served_is_refused_by_file_and_field(tmp_path, change, hint):
    folder = write_artifact(tmp_path / "a", film())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(StartError, match=hint) as error:
        read(folder)
    assert str(folder / "manifest.json") in str(error.value)


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StartError, match=r"manifest\.json"):
        read(tmp_path)


def test_a_place_is_an_artifact_or_a_folder_of_them(tmp_path):
    write_artifact(tmp_path / "shelf" / "b", room("b"))
    write_artifact(tmp_path / "shelf" / "a", film("a"))
    write_artifact(tmp_path / "shelf" / ".c.partial", film("c"))
    write_artifact(tmp_path / "one", film("z"))
    found = find([tmp_path / "one", tmp_path / "nowhere", tmp_path / "shelf"])
    assert [(f.info.name, f.folder) for f in found] == [
        ("z", tmp_path / "one"), ("a", tmp_path / "shelf" / "a"), ("b", tmp_path / "shelf" / "b"),
    ]  # fmt: skip


def test_two_artifacts_of_one_name_are_refused(tmp_path):
    write_artifact(tmp_path / "a", film())
    write_artifact(tmp_path / "b", film())
    with pytest.raises(StartError, match="both named 'film'"):
        find([tmp_path])
