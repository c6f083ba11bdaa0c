"""POST /generate/video with an image to start from: as a file, in a data URI, or by its URL."""

from __future__ import annotations

import asyncio
import base64
import json
from urllib.parse import urlsplit

import httpx
import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import metrics
from service.api.app import create_app
from service.jobs import VideoRequest
from service.queue.client import Queue
from service.results import MissingError, Results
from service.settings import Settings
from tests.service.api.routes.test_generate import JSON, REQUEST
from tests.service.api.routes.test_reconstruct import animation, declared, nothing_stored, stored
from tests.service.api.sites import Site, pages, response, site
from tests.service.support import film, picture, until, write_artifact

PATH = "/generate/video"
ALLOWED = "127.0.0.2"  # stands for a public address
PNG, JPEG, WEBP = (picture(kind) for kind in ("PNG", "JPEG", "WEBP"))
WEB = {
    "a.png": response(PNG, Content_Type="text/html"),
    "page": response(b"<html>", Content_Type="image/png"),
    "bomb": response(declared(12_000, 12_000)),
    "large": response(b"\0" * 70_000),
    "moved": response(b"", "302 Found", Location="http://127.0.0.1/a.png"),
}


@pytest.fixture
async def there():
    async with site(pages(**WEB), ALLOWED) as there:
        yield there


@pytest.fixture
def settings(settings, there):
    change = {"fetch_hosts": "*", "fetch_networks": f"{ALLOWED}/32", "fetch_ports": f"{there.port}, 80"}
    return type(settings)(**(settings.model_dump() | change))


@pytest.fixture
def artifacts(artifacts):
    """`film` takes no image, `both` may, `start` must."""
    write_artifact(artifacts / "both", film("both", "optional"))
    write_artifact(artifacts / "start", film("start", "required"))
    return artifacts


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def url(there: Site, name: str = "a.png") -> str:
    return f"http://{ALLOWED}:{there.port}/{name}"


def upload(content: bytes, name: str = "a.png") -> dict:
    return {"files": {"image": (name, content)}}


async def post(client, image: str | bytes, **fields):
    """A file where the image is bytes, else JSON."""
    if isinstance(image, bytes):
        return await client.post(PATH, data=REQUEST | fields, **upload(image))
    return await client.post(PATH, json=REQUEST | fields | {"image": image})


@pytest.mark.parametrize(("content", "kind"), [(PNG, "png"), (JPEG, "jpeg"), (WEBP, "webp")])
@pytest.mark.parametrize("way", [lambda content: content, uri], ids=["file", "data URI"])
async def test_an_image_lies_in_the_store_as_it_came(client, results, content, kind, way):
    answer = await post(client, way(content))
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{job['id']}")
    image = job["request"]["image"]
    assert (image["type"], image["bytes"]) == (f"image/{kind}", len(content))
    assert image["path"].startswith(f"uploads/{job['id']}/")
    assert await stored(results, image["path"]) == content
    assert (await client.get(answer.headers["location"])).json()["request"] == job["request"]


async def test_an_image_is_fetched_from_its_url_and_judged_by_its_bytes(client, results, there):
    answer = await post(client, url(there))
    image = answer.json()["request"]["image"]
    assert (answer.status_code, image["type"], there.connections) == (202, "image/png", 1)
    assert await stored(results, image["path"]) == PNG
    assert urlsplit(url(there)).netloc not in answer.text  # it may have been a secret


async def test_the_fields_of_a_form_are_those_of_json(client):
    given = {"width": 96, "height": 32, "frames": 13, "fps": 12, "steps": 7, "guidance": 0.5, "seed": 5}
    texts = {name: str(value) for name, value in given.items()} | {"artifact": "both", "negative_prompt": "fog"}
    job = (await client.post(PATH, data=REQUEST | texts, **upload(PNG))).json()
    assert job["request"] | given | {"artifact": "both", "negative_prompt": "fog"} == job["request"]
    without = await client.post(PATH, files={"prompt": (None, "a form without a file")})
    assert (without.status_code, without.json()["request"]["image"]) == (202, None)


# Which artifact


@pytest.mark.parametrize(("image", "chosen"), [(None, "both"), (PNG, "both"), (uri(PNG), "both")])
async def test_an_artifact_left_out_is_one_that_suits(client, queue, image, chosen):
    answer = await (post(client, image) if image else client.post(PATH, json=REQUEST))
    assert (answer.status_code, answer.json()["artifact"]) == (202, chosen)
    await queue.beat("w1", [film("start", "required")])
    await asyncio.sleep(1.1)  # the catalogue asks once a second
    answer = await (post(client, image) if image else client.post(PATH, json=REQUEST))
    assert answer.json()["artifact"] == ("start" if image else "both")


@pytest.mark.parametrize("image", [PNG, uri(PNG), "url"], ids=["file", "data URI", "URL"])
async def test_an_artifact_that_takes_no_image_says_which_do(client, settings, there, image):
    answer = await post(client, url(there) if image == "url" else image, artifact="film")
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert answer.json()["detail"] == "image: film takes no image; both, start would do"
    assert there.connections == 0
    assert nothing_stored(settings)


async def test_an_artifact_that_needs_an_image_says_so(client):
    answer = await client.post(PATH, json=REQUEST | {"artifact": "start", "width": 65})
    assert (answer.status_code, {error["field"] for error in answer.json()["errors"]}) == (422, {"image", "width"})
    assert "start films on from a picture" in answer.json()["detail"]


async def test_what_an_artifact_takes_is_shown(client):
    told = {one["name"]: one["limits"].get("image") for one in (await client.get("/artifacts")).json()}
    assert told == {"film": "none", "both": "optional", "start": "required", "room": None}


# What is refused


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is not a JPEG, PNG or WebP"),
        (picture("GIF"), "is not a JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG or WebP"),
        (declared(9000, 9000), "9000 × 9000"),
        (declared(60_000, 60_000), "more than 40000000 pixels"),
        (declared(8, 40), "each side needs 16"),
        (animation("WEBP"), "animated"),
        (b"\0" * 65_537, "has 65537 bytes; at most 65536"),
    ],
)
@pytest.mark.parametrize("way", [lambda content: content, uri], ids=["file", "data URI"])
async def test_what_is_no_usable_image_is_refused(client, settings, content, hint, way):
    answer = await post(client, way(content))
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert hint in answer.json()["detail"]
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        ("", "must be a data URI"),
        ("a.png", "must be a data URI"),
        ("/etc/passwd", "must be a data URI"),
        ("file:///etc/passwd", "must be a data URI"),
        ("gopher://127.0.0.2/", "must be a data URI"),
        ("data:", "another kind"),
        ("data:text/html;base64,AAAA", "another kind"),
        ("data:image/gif;base64,AAAA", "another kind"),
        ("data:image/svg+xml;base64,AAAA", "another kind"),
        ("data:image/png,AAAA", "another kind"),
        ("data:image/png;charset=utf-8;base64,AAAA", "another kind"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,AAA", "is not in base64: Incorrect padding"),
        ("data:image/png;base64,AA=A", "is not in base64"),
        ("data:image/png;base64,AAAA\nAAAA", "is not in base64"),
        ("data:image/png;base64,iVBO_-Rw", "is not in base64"),
        ("data:image/png;base64,iVBO%2BRw=", "is not in base64"),
        ("data:image/png;base64,ÄÖÜß", "is not in base64"),
        ("data:image/png;base64," + "A" * 90_000, "has 67500 bytes; at most 65536"),
        (5, "valid string"),
        (["https://example.org/a.png"], "valid string"),
        ({"url": "https://example.org/a.png"}, "valid string"),
        (True, "valid string"),
        ("http://\ud800.test/", "surrogate"),
    ],
)
async def test_what_names_no_image_is_refused(client, settings, image, hint):
    body = json.dumps(REQUEST | {"image": image})
    answer = await client.post(PATH, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert hint in answer.json()["detail"]
    assert len(answer.content) < 1000
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("page", "is not a JPEG, PNG or WebP"),
        ("bomb", "more than 40000000 pixels"),
        ("large", "has 70000 bytes; at most 65536"),
        ("missing", "answered 404"),
        ("moved", "leads to no public address"),
    ],
)
async def test_what_a_url_leads_to_is_refused_like_a_file(client, queue, settings, there, name, hint):
    answer = await post(client, url(there, name))
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert hint in answer.json()["detail"]
    assert nothing_stored(settings)
    assert (await queue.stats()).waiting == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "2130706433"])
async def test_a_url_that_leads_inside_is_refused(client, settings, host):
    answer = await post(client, f"http://{host}/a.png")
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert "leads to no public address" in answer.json()["detail"]
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("form", "field", "hint"),
    [
        ({"files": [("image", ("a", PNG)), ("image", ("b", PNG))]}, "image", "one file, got 2"),
        ({"files": {"image": (None, "https://example.org/a.png")}}, "image", "must be a file here"),
        ({"files": {"picture": ("a", PNG)}}, "picture", "the file is in image"),
        ({"data": {"stepz": "4"}, **upload(PNG)}, "stepz", "its fields are prompt, "),
        ({"data": {"steps": "many"}, **upload(PNG)}, "steps", "integer"),
        ({"data": {"steps": ["4", "5"]}, **upload(PNG)}, "steps", "twice"),
        ({"data": {"guidance": "nan"}, **upload(PNG)}, "guidance", "finite"),
        ({"data": {"prompt": "a\x07b"}, **upload(PNG)}, "prompt", "control"),
        ({"data": {"width": "65"}, **upload(PNG)}, "width", "64 or 80"),
    ],
)
async def test_a_bad_form_is_refused_by_field(client, settings, form, field, hint):
    form["data"] = REQUEST | form.get("data", {})
    answer = await client.post(PATH, **form)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert hint in answer.json()["detail"]
    assert nothing_stored(settings)


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ([("image", ("a", b"x"))] * 33, "image"),
        ([("steps", (None, "4"))] * 33, "body"),
        ([("prompt", (None, "x" * 140_000)), ("image", ("a", b"x"))], "body"),
    ],
)
async def test_a_form_of_too_many_parts_or_too_long_ones_is_refused(client, settings, files, field):
    answer = await client.post(PATH, files=files)
    assert (answer.status_code, answer.json()["type"]) in (
        (400, "urn:lowbit:problem:malformed-body"),
        (413, "urn:lowbit:problem:body-too-large"),
    )
    assert answer.json()["field"] == field
    assert nothing_stored(settings)


async def test_a_form_needs_its_prompt_too(client):
    answer = await client.post(PATH, **upload(PNG))
    assert (answer.status_code, answer.json()["detail"]) == (422, "prompt: is required")


# How large, how many


async def test_only_the_image_makes_a_body_long(client, settings):
    """Padded to the largest image: in base64, and as those write it who escape every slash."""
    content = PNG + b"\xff" * (settings.max_start_image_bytes - len(PNG))  # base64 of slashes alone
    body = json.dumps(REQUEST | {"image": uri(content)})
    for text in (body, body.replace("/", "\\/")):
        answer = await client.post(PATH, content=text, headers=JSON)
        assert (answer.status_code, answer.json()["request"]["image"]["bytes"]) == (202, len(content))


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(REQUEST | {"negative_prompt": "x" * 140_000}),
        json.dumps(REQUEST | {"image": uri(PNG), "x" * 140_000: 1}),
        json.dumps(REQUEST | {"image": uri(PNG), "artifact": [[]] * 35_000}),
        '{"image": ' + "[" * 140_000,
        json.dumps(REQUEST | {"image": uri(PNG), "negative_prompt": " " * 140_000}),
    ],
    ids=["prompt", "name", "values", "brackets", "blanks"],
)
async def test_a_body_that_is_long_beside_its_image_is_refused(client, body):
    answer = await client.post(PATH, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:lowbit:problem:body-too-large")
    assert "beside its image; at most 131072" in answer.json()["detail"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_body_longer_than_any_image_is_refused_as_it_comes(client, settings, kind):
    async def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(8):
            yield b"x" * 65_536

    answer = await client.post(PATH, content=chunks(), headers={"content-type": kind})
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:lowbit:problem:body-too-large")
    assert nothing_stored(settings)


async def test_a_body_that_breaks_off_is_no_fault_of_ours(client):
    rejected = metrics.jobs_rejected.labels("malformed-body")
    faults = metrics.jobs_rejected.labels("internal")
    form = '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx'
    for kind, part in (("application/json", '{"prompt": "'), ("multipart/form-data; boundary=x", form)):
        before, faults_before = rejected._value.get(), faults._value.get()
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n{part}"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await until(lambda before=before: rejected._value.get() == before + 1)
        assert faults._value.get() == faults_before


# The same request twice


async def test_an_image_counts_by_its_contents(client, queue):
    key = {"Idempotency-Key": "film"}
    first = await client.post(PATH, data=REQUEST, headers=key, **upload(PNG))
    renamed = await client.post(PATH, data=REQUEST, headers=key, **upload(PNG, "other.png"))
    inside = await client.post(PATH, json=REQUEST | {"image": uri(PNG)}, headers=key)
    assert first.json() == renamed.json() == inside.json()
    assert (await queue.stats()).waiting == 1
    for other in ({"data": REQUEST, **upload(JPEG)}, {"json": REQUEST}, {"json": REQUEST | {"image": uri(WEBP)}}):
        assert (await client.post(PATH, headers=key, **other)).status_code == 409


async def test_a_url_counts_as_a_url_and_is_fetched_once(client, queue, there):
    key = {"Idempotency-Key": "film"}
    asked = [await client.post(PATH, json=REQUEST | {"image": url(there)}, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in asked] == [202, 202]
    assert asked[0].json() == asked[1].json()
    other = await client.post(PATH, json=REQUEST | {"image": url(there) + "?again"}, headers=key)
    assert (other.status_code, there.connections) == (409, 1)


async def test_nothing_is_fetched_for_a_request_that_would_be_refused(client, queue, there):
    assert (await post(client, url(there), width=65)).status_code == 422
    await queue.redis.zadd(queue.key("waiting"), {f"job-{i}": 2e15 for i in range(queue.settings.queue_bound)})
    assert (await post(client, url(there))).status_code == 429
    assert there.connections == 0


async def test_a_submission_that_loses_a_race_leaves_no_image(client, queue, results, there, monkeypatch):
    async def nobody_was_first(*_):
        return None

    key = {"Idempotency-Key": "race"}
    first = (await client.post(PATH, json=REQUEST | {"image": url(there)}, headers=key)).json()
    monkeypatch.setattr(queue, "precheck", nobody_was_first)  # both looked before either enqueued
    reserved = []
    reserve = queue.reserve
    monkeypatch.setattr(queue, "reserve", lambda job_id: reserved.append(job_id) or reserve(job_id))
    assert (await client.post(PATH, json=REQUEST | {"image": url(there)}, headers=key)).json() == first
    with pytest.raises(MissingError):
        await stored(results, f"uploads/{reserved[0]}/image.png")
    assert await stored(results, first["request"]["image"]["path"]) == PNG


async def test_both_bodies_are_described_and_their_examples_are_taken(client):
    openapi = (await client.get("/openapi.json")).json()
    content = openapi["paths"][PATH]["post"]["requestBody"]["content"]
    assert content.keys() == {"application/json", "multipart/form-data"}
    schemas = {kind: described["schema"] for kind, described in content.items()}
    for schema in schemas.values():
        assert schema["properties"].keys() == VideoRequest.model_fields.keys()
        assert (schema["required"], schema["additionalProperties"]) == (["prompt"], False)
    for example in schemas["application/json"]["examples"]:
        VideoRequest.model_validate(example)
    for example in schemas["multipart/form-data"]["examples"]:
        VideoRequest.model_validate_strings(example)


# Whatever else comes

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
URIS = st.binary(max_size=60).map(uri)
URLS = st.builds(
    "{}:{}{}".format, st.sampled_from(["http", "https", "HTTP"]), st.sampled_from(["", "/", "//"]), st.text()
)
VALUES = st.one_of(URIS, URLS, st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
NAMES = st.one_of(st.sampled_from(sorted(VideoRequest.model_fields)), st.text(max_size=5))


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What the API answers to a body, without a queue server behind it."""
    folder = tmp_path_factory.mktemp("artifacts")
    write_artifact(folder / "start", film("start", "required"))
    settings = Settings(artifacts=(folder,), data=folder, fetch_hosts="*", fetch_ports="1")
    queue = Queue.open(f"unix://{folder}/nobody.sock", settings)
    transport = httpx.ASGITransport(create_app(settings, queue, Results("memory:///")))
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=transport, base_url="http://api", verify=False)
        yield lambda **body: runner.run(client.post(PATH, **body))
        runner.run(client.aclose())


@hypothesis.settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4), VALUES)
def test_whatever_a_body_holds_the_answer_names_what_is_wrong(answered, fields, image):
    body = json.dumps(REQUEST | {"image": image} | fields)
    answer = answered(content=body, headers=JSON)
    problem = answer.json()
    assert (answer.status_code, problem["type"].rsplit(":")[-1]) in (
        (422, "invalid-request"),
        (503, "queue-unavailable"),  # all was well with it
    )


@hypothesis.settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, st.text(max_size=20), max_size=4), st.binary(max_size=60))
def test_whatever_a_form_holds_the_answer_names_what_is_wrong(answered, fields, image):
    answer = answered(data=REQUEST | fields, files={"image": ("a", image)})
    assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) in (
        (422, "invalid-request"),
        (503, "queue-unavailable"),
    )
