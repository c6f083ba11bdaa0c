from __future__ import annotations

import hashlib
import tempfile

import pytest

from service.results import MissingError, Results, StorageError, result_path, upload_path

DATA = bytes(range(256)) * 10_000


@pytest.fixture(params=["file", "memory"])
def results(request, tmp_path) -> Results:
    return Results((tmp_path / "kept").as_uri() if request.param == "file" else "memory:///")


async def read(results: Results, path: str, span: tuple[int, int] | None = None) -> bytes:
    return b"".join([chunk async for chunk in results.read(path, span)])


async def test_what_is_put_is_what_is_read(results, tmp_path):
    (tmp_path / "source").write_bytes(DATA)
    stored = await results.put("jobs/a/1/x.bin", tmp_path / "source")
    assert (stored.bytes, stored.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert await read(results, "jobs/a/1/x.bin") == DATA
    assert await read(results, "jobs/a/1/x.bin", (10, 300)) == DATA[10:300]
    await results.fetch("jobs/a/1/x.bin", tmp_path / "copy", stored.sha256)
    assert (tmp_path / "copy").read_bytes() == DATA


@pytest.mark.parametrize("spooled", [True, False])
async def test_an_upload_is_put_from_its_start_whether_in_memory_or_on_disk(results, spooled):
    with tempfile.SpooledTemporaryFile(max_size=10**8 if spooled else 10) as upload:
        upload.write(DATA)
        assert (await results.put(upload_path("a", "0.png"), upload)).bytes == len(DATA)
    assert await read(results, "uploads/a/0.png") == DATA


async def test_a_file_that_is_not_there_is_missing(results, tmp_path):
    with pytest.raises(MissingError, match="jobs/a/1/none"):
        await read(results, "jobs/a/1/none")
    with pytest.raises(MissingError):
        await results.fetch("jobs/a/1/none", tmp_path / "copy", "0" * 64)


async def test_a_file_that_changed_on_the_way_is_refused(results, tmp_path):
    (tmp_path / "source").write_bytes(DATA)
    await results.put("uploads/a/0", tmp_path / "source")
    with pytest.raises(StorageError, match="SHA-256"):
        await results.fetch("uploads/a/0", tmp_path / "copy", "0" * 64)


async def test_removing_a_job_removes_its_files_and_no_others(results, tmp_path):
    (tmp_path / "source").write_bytes(b"x")
    for path in (result_path("a", 1, "v"), result_path("a", 2, "v"), upload_path("a", "0"), result_path("ab", 1, "v")):
        await results.put(path, tmp_path / "source")
    await results.remove("jobs/a", "uploads/a", "uploads/nobody")
    assert await read(results, "jobs/ab/1/v") == b"x"
    for path in ("jobs/a/1/v", "jobs/a/2/v", "uploads/a/0"):
        with pytest.raises(MissingError):
            await read(results, path)


async def test_paths_cannot_leave_the_store(tmp_path):
    results = Results((tmp_path / "kept").as_uri())
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ValueError, match="illegal"):
        await read(results, "jobs/../../secret")


@pytest.mark.parametrize("url", ["bogus://bucket", "file:///proc/nowhere/results", "not a url"])
def test_a_place_that_cannot_keep_files_is_refused_by_name(url):
    with pytest.raises(StorageError, match=url.split(":")[0]):
        Results(url)


async def test_a_store_that_fails_is_a_storage_error(tmp_path):
    results = Results((tmp_path / "kept").as_uri())
    (tmp_path / "kept" / "jobs").write_text("a file where a folder belongs")
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(StorageError, match="jobs/a/1/v"):
        await results.put("jobs/a/1/v", tmp_path / "source")
