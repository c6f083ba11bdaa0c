"""POST /reconstruct/3d: images, a video, or the video of another job."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from service.results import MissingError, Results
from service.settings import Settings
from tests.service.queue.test_client import RESULT, claim
from tests.service.support import new_id, picture, room, video_task

PNG = picture()


def images(*contents: bytes, name: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(name, (f"{number}.png", content)) for number, content in enumerate(contents)]


def declared(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def animation(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


async def stored(results: Results, path: str) -> bytes:
    return b"".join([chunk async for chunk in results.read(path)])


def nothing_stored(settings: Settings) -> bool:
    return not [path for path in (settings.data / "results").rglob("*") if path.is_file()]


async def test_images_make_a_job_and_lie_in_the_store(client, results):
    contents = [PNG, picture("JPEG"), picture("WEBP")]
    response = await client.post("/reconstruct/3d", files=images(*contents))
    job = response.json()
    assert (response.status_code, response.headers["location"]) == (202, f"/jobs/{job['id']}")
    assert (job["kind"], job["artifact"], job["request"]["max_views"]) == ("scene", "room", 4)
    assert job["request"]["formats"] == ["glb", "ply", "cameras", "depth"]
    assert [image["type"] for image in job["request"]["images"]] == ["image/png", "image/jpeg", "image/webp"]
    for image, content in zip(job["request"]["images"], contents, strict=True):
        assert await stored(results, image["path"]) == content


async def test_a_list_may_be_written_with_brackets(client):
    data = {"formats[]": ["ply", "glb", "ply"], "max_views": "3"}
    job = (await client.post("/reconstruct/3d", files=images(PNG, PNG, name="images[]"), data=data)).json()
    assert (job["request"]["formats"], job["request"]["max_views"]) == (["ply", "glb"], 3)


@pytest.mark.parametrize(("head", "kind"), [(b"\0\0\0\x18ftypisom", "video/mp4"), (b"\x1aE\xdf\xa3....", "video/webm")])
async def test_a_video_is_stored_for_the_worker_to_sample(client, results, head, kind):
    job = (await client.post("/reconstruct/3d", files={"video": ("clip", head * 9)})).json()
    assert job["request"]["video"]["type"] == kind
    assert await stored(results, job["request"]["video"]["path"]) == head * 9


async def test_the_video_of_a_finished_job_can_be_reconstructed(client, queue):
    made = (await queue.enqueue(new_id(), "video", video_task())).job
    early = (await client.post("/reconstruct/3d", files={"job": (None, made.id)})).json()
    assert (early["field"], "queued" in early["detail"]) == ("job", True)
    await queue.finish(await claim(queue), [RESULT])
    job = (await client.post("/reconstruct/3d", files={"job": (None, made.id)})).json()
    assert job["request"]["job"] == made.id
    assert job["request"]["video"] == {
        "path": f"jobs/{made.id}/1/video.mp4", "type": "video/mp4", "bytes": RESULT.bytes, "sha256": RESULT.sha256,
    }  # fmt: skip


async def test_a_phone_s_jpeg_with_a_second_picture_inside_is_taken(client):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 20))])
    job = (await client.post("/reconstruct/3d", files=images(buffer.getvalue(), PNG))).json()
    assert job["request"]["images"][0]["type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is not a JPEG, PNG or WebP"),
        (b"\x89PNG\r\n\x1a\n", "is not a JPEG, PNG or WebP"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "is not a JPEG, PNG or WebP"),
        (picture("GIF"), "is not a JPEG, PNG or WebP"),
        (picture("BMP"), "is not a JPEG, PNG or WebP"),
        (picture("TIFF"), "is not a JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG or WebP"),
        (declared(9000, 9000), "9000 × 9000"),
        (declared(12000, 12000), "more than 40000000 pixels"),
        (declared(60000, 60000), "more than 40000000 pixels"),
        (declared(8, 40), "each side needs 16"),
        (animation("PNG"), "animated"),
        (animation("WEBP"), "animated"),
    ],
)
async def test_an_upload_that_is_no_usable_image_is_refused(client, settings, content, hint):
    response = await client.post("/reconstruct/3d", files=images(PNG, content))
    problem = response.json()
    assert (response.status_code, problem["field"]) == (422, "images")
    assert hint in problem["detail"]
    assert "image 2 of 2" in problem["detail"]
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("form", "field", "hint"),
    [
        ({}, "images", "one of images, video and job"),
        ({"files": images(PNG)}, "images", "2 to 4 images, got 1"),
        ({"files": images(*[PNG] * 5)}, "images", "2 to 4 images, got 5"),
        ({"files": [*images(PNG, PNG), ("job", (None, "0" * 32))]}, "images", "one of images, video and job"),
        ({"files": {"images": (None, "text")}}, "images", "must be a file"),
        ({"files": {"video": ("x.mp4", b"RIFF....AVI ")}}, "video", "MP4"),
        ({"files": {"video": ("x.mp4", b"")}}, "video", "empty"),
        ({"files": {"video": ("x.m3u8", b"#EXTM3U\nfile:///etc/passwd")}}, "video", "MP4"),
        ({"files": [("video", ("a", b"x")), ("video", ("b", b"x"))]}, "video", "one file, got 2"),
        ({"files": {"job": (None, "0" * 32)}}, "job", "no video job"),
        ({"files": {"job": (None, "nonsense")}}, "job", "match"),
        ({"files": images(PNG, PNG), "data": {"max_views": "5"}}, "max_views", "from 2 to 4"),
        ({"files": images(PNG, PNG), "data": {"max_views": "many"}}, "max_views", "integer"),
        ({"files": images(PNG, PNG), "data": {"formats": ["glb", "obj"]}}, "formats", "'obj'"),
        ({"files": images(PNG, PNG), "data": {"artifact": "film"}}, "artifact", "room"),
        ({"files": images(PNG, PNG), "data": {"artifact": ["room", "room"]}}, "artifact", "twice"),
        ({"files": images(PNG, PNG), "data": {"vews": "3"}}, "vews", "max_views"),
        ({"files": [*images(PNG, PNG), ("mesh", ("m.glb", b"x"))]}, "mesh", "no file"),
    ],
)
async def test_a_bad_form_is_refused_by_field(client, settings, form, field, hint):
    form.setdefault("files", {"max_views": (None, "4")})  # so that it is multipart
    response = await client.post("/reconstruct/3d", **form)
    problem = response.json()
    assert (response.status_code, problem["type"]) == (422, "urn:lowbit:problem:invalid-request")
    assert problem["field"] == field
    assert hint in problem["detail"]
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("body", "kind", "status", "slug"),
    [
        (b"{}", "application/json", 415, "unsupported-media-type"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "unsupported-media-type"),
        (b"no parts", "multipart/form-data", 400, "malformed-body"),
        (b"no parts", "multipart/form-data; boundary=x", 400, "malformed-body"),
        (b"--x--", "multipart/form-data; boundary=x; charset=undefined", 415, "unsupported-media-type"),
        (b"--x--", "multipart/form-data; boundary=x; charset=punycode", 415, "unsupported-media-type"),
    ],
)
async def test_a_body_that_is_no_form_is_refused(client, body, kind, status, slug):
    response = await client.post("/reconstruct/3d", content=body, headers={"content-type": kind})
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"urn:lowbit:problem:{slug}")
    assert problem["field"] == ("body" if status == 400 else "content-type")


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"files": images(*[b"x"] * 513)}, "images"),
        ({"files": [*images(PNG), *[("max_views", (None, "4"))] * 65]}, "body"),
        ({"files": [*images(PNG), ("artifact", (None, "x" * 5000))]}, "body"),
    ],
)
async def test_a_form_of_too_many_parts_or_too_long_ones_is_refused(client, settings, form, field):
    response = await client.post("/reconstruct/3d", **form)
    problem = response.json()
    assert (response.status_code, problem["type"], problem["field"]) == (
        400,
        "urn:lowbit:problem:malformed-body",
        field,
    )
    assert nothing_stored(settings)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_form_over_the_limit_is_refused_and_leaves_nothing(client, settings, chunked):
    limit = settings.max_upload_bytes
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'

    async def body():
        yield part
        for _ in range(limit // 65536 + 2):
            yield b"\0" * 65536

    headers = {"content-type": "multipart/form-data; boundary=x"}
    if not chunked:
        headers["content-length"] = str(len(part) + (limit // 65536 + 2) * 65536)
    response = await client.post("/reconstruct/3d", content=body(), headers=headers)
    assert (response.status_code, response.json()["type"]) == (413, "urn:lowbit:problem:body-too-large")
    assert nothing_stored(settings)


async def test_the_same_key_and_files_are_the_same_job_and_stored_once(client, queue, results):
    key = {"Idempotency-Key": "scene"}
    first = (await client.post("/reconstruct/3d", files=images(PNG, PNG), headers=key)).json()
    again = (await client.post("/reconstruct/3d", files=images(PNG, PNG), headers=key)).json()
    assert first == again
    other = await client.post("/reconstruct/3d", files=images(PNG, picture(size=(50, 50))), headers=key)
    assert other.status_code == 409
    assert (await queue.stats()).waiting == 1


async def test_a_submission_that_loses_a_race_leaves_no_files(client, queue, results, monkeypatch):
    async def nobody_was_first(*_):
        return None

    key = {"Idempotency-Key": "race"}
    first = (await client.post("/reconstruct/3d", files=images(PNG, PNG), headers=key)).json()
    monkeypatch.setattr(queue, "precheck", nobody_was_first)  # both looked before either enqueued
    reserved = []
    reserve = queue.reserve
    monkeypatch.setattr(queue, "reserve", lambda job_id: reserved.append(job_id) or reserve(job_id))
    assert (await client.post("/reconstruct/3d", files=images(PNG, PNG), headers=key)).json() == first
    with pytest.raises(MissingError):
        await stored(results, f"uploads/{reserved[0]}/000.png")
    assert await stored(results, f"uploads/{first['id']}/000.png") == PNG


async def test_an_artifact_a_worker_published_sets_the_limits(client, queue):
    other = room("other").model_copy(
        update={"limits": room().limits.model_copy(update={"min_views": 1, "max_views": 1})}
    )
    await queue.beat("w1", [other])
    job = (await client.post("/reconstruct/3d", files=images(PNG))).json()
    assert (job["artifact"], job["request"]["max_views"]) == ("other", 1)
