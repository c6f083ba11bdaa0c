"""Downloads: whole, in part, and not again."""

from __future__ import annotations

import hashlib

import pytest

from service.jobs import Result
from service.results import result_path
from tests.service.queue.test_client import claim, submit

DATA = bytes(range(256)) * 40


@pytest.fixture
async def url(queue, results, tmp_path) -> str:
    """Of video.mp4 of a job that has succeeded."""
    job_id = await submit(queue)
    lease = await claim(queue)
    (tmp_path / "video").write_bytes(DATA)
    stored = await results.put(result_path(job_id, 1, "video.mp4"), tmp_path / "video")
    url = f"/jobs/{job_id}/result/video.mp4"
    result = Result(name="video.mp4", type="video/mp4", bytes=stored.bytes, sha256=stored.sha256, url=url)
    gone = result.model_copy(update={"name": "scene.glb", "type": "model/gltf-binary"})
    await queue.finish(lease, [result, gone])
    return url


async def test_a_result_is_the_file_with_its_type_and_hash(client, url):
    response = await client.get(url)
    assert (response.status_code, response.content) == (200, DATA)
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["content-length"] == str(len(DATA))
    assert response.headers["content-disposition"] == 'inline; filename="video.mp4"'
    assert response.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=10000-", 10000, 10240),
        ("bytes=-40", 10200, 10240),
        ("bytes=-99999", 0, 10240),
        ("bytes=10000-99999", 10000, 10240),
    ],
)
async def test_a_range_is_that_part_of_the_file(client, url, asked, start, end):
    response = await client.get(url, headers={"Range": asked})
    assert (response.status_code, response.content) == (206, DATA[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
async def test_a_range_outside_the_file_is_refused(client, url, asked):
    response = await client.get(url, headers={"Range": asked})
    assert (response.status_code, response.json()["field"]) == (416, "range")
    assert response.headers["content-range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "bytes=0-1,5-6", "lines=1-2", "bytes=x-"])
async def test_a_range_that_is_none_is_the_whole_file(client, url, asked):
    response = await client.get(url, headers={"Range": asked})
    assert (response.status_code, response.content) == (200, DATA)


async def test_what_a_caller_has_is_not_sent_again(client, url):
    tag = (await client.get(url)).headers["etag"]
    again = await client.get(url, headers={"If-None-Match": f'"other", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    part = await client.get(url, headers={"Range": "bytes=0-9", "If-Range": tag})
    assert part.status_code == 206
    whole = await client.get(url, headers={"Range": "bytes=0-9", "If-Range": '"of another version"'})
    assert (whole.status_code, whole.content) == (200, DATA)


async def test_a_name_that_is_none_is_told_what_there_is(client, url):
    response = await client.get(url.replace("video.mp4", "video.avi"))
    assert (response.status_code, response.json()["type"]) == (404, "urn:lowbit:problem:result-not-found")
    assert "video.mp4, scene.glb" in response.json()["detail"]


async def test_a_job_that_has_not_ended_has_no_results(client, queue):
    response = await client.get(f"/jobs/{await submit(queue)}/result/video.mp4")
    assert response.status_code == 404
    assert "is queued" in response.json()["detail"]


async def test_a_file_that_is_no_longer_kept_is_gone(client, url):
    response = await client.get(url.replace("video.mp4", "scene.glb"))
    assert (response.status_code, response.json()["type"]) == (410, "urn:lowbit:problem:result-gone")


async def test_a_store_that_fails_is_503(client, url, settings):
    kept = settings.data / "results" / "jobs"
    kept.rename(kept.with_name("away"))
    kept.write_text("a file where a folder belongs")
    response = await client.get(url)
    assert (response.status_code, response.json()["type"]) == (503, "urn:lowbit:problem:storage-unavailable")
    assert "retry-after" in response.headers
