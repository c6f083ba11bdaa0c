"""Folders as the hub's own programs lay them out, and what they tell."""

from __future__ import annotations

import pytest

from models import compress, hub, stream
from models.compress import Recipe
from models.wan import Wan
from quant_runtime import artifact
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W8A8
from quant_runtime.methods import Rtn
from service import offline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    Wan().tiny(folder)
    return folder


def snapshot(tiny, cache):
    """Files lie under their hashes, and a snapshot is links to them."""
    repository = cache / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    folder = repository / "snapshots" / COMMIT
    for number, path in enumerate(sorted(path for path in tiny.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), folder / path.relative_to(tiny)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(blob)
    return folder


def downloaded(tiny, folder, commits):
    """`hf download --local-dir`: the files themselves, and a note of each in .cache."""
    artifact.link_or_copy(tiny, folder)
    notes = folder / ".cache" / "huggingface" / "download"
    for file, commit in zip(("model_index.json", "transformer/config.json"), commits, strict=True):
        note = notes / f"{file}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{commit}\n0a1b\n1760000000.0\n")
    return folder


def test_a_snapshot_in_the_cache_tells_its_repository_and_its_commit(tiny, tmp_path):
    folder = snapshot(tiny, tmp_path)
    assert hub.name(folder) == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert hub.revision(folder) == COMMIT
    (tmp_path / "wan").symlink_to(folder)
    assert hub.revision(tmp_path / "wan") == COMMIT


def test_a_download_tells_its_commit_where_all_its_files_are_of_one(tiny, tmp_path):
    assert hub.revision(downloaded(tiny, tmp_path / "one", [COMMIT, COMMIT])) == COMMIT
    assert hub.revision(downloaded(tiny, tmp_path / "two", [COMMIT, COMMIT[::-1]])) is None
    assert hub.revision(downloaded(tiny, tmp_path / "odd", ["main", "main"])) is None
    assert hub.name(tmp_path / "one") == "one"


def test_any_other_folder_tells_nothing(tiny):
    assert (hub.name(tiny), hub.revision(tiny)) == ("tiny", None)


@pytest.mark.parametrize("way", ["whole", "stream"])
def test_the_manifest_has_the_revision_and_the_artifact_none_of_the_hubs_notes(tiny, tmp_path, way):
    source, words = downloaded(tiny, tmp_path / "one", [COMMIT, COMMIT]), {"base": "tiny", "device": "cpu"}
    if way == "whole":
        recipe = Recipe(Rtn(), W8A8, judging_samples=0)
        made = compress.compress(Wan(), source, recipe, tmp_path / "out", on_progress=lambda *_: None, **words)
    else:
        made = stream.compress(
            Wan(), source, Rtn(), W8A8, AttentionPlan(), tmp_path / "out", on_bytes=lambda *_: None, **words
        )
    assert made.base.revision == COMMIT
    assert ("base", f"tiny @ {COMMIT}") in offline.rows(made)
    assert not (tmp_path / "out" / ".cache").exists()
