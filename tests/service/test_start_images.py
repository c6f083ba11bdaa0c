"""A start image the whole way: over HTTP, through queue and store, to a worker's generator, and away with its job."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator

import httpx
import pytest
from PIL import Image

from service.api.app import create_app
from service.api.upkeep import remove_old
from service.artifacts import find
from service.worker.loop import Worker
from service.worker.runner import Runner
from tests.service.api.sites import always, response, site
from tests.service.queue.test_client import with_settings
from tests.service.support import film, serving, until, write_artifact
from tests.service.worker import toy
from tests.service.worker.test_inputs import GREEN, RED, encode, halves
from tests.service.worker.test_loop import at_work

ALLOWED = "127.0.0.2"  # stands for a public address
SIDEWAYS = 6  # EXIF: the camera lay on its side, show it turned clockwise


def photograph() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    return encode(halves(), "PNG", exif=exif)


@pytest.fixture
async def there():
    async with site(always(response(photograph())), ALLOWED) as there:
        yield there


@pytest.fixture
def settings(settings, there):
    change = {"fetch_hosts": "*", "fetch_networks": f"{ALLOWED}/32", "fetch_ports": str(there.port)}
    return type(settings)(**(settings.model_dump() | change))


@pytest.fixture
async def client(settings, queue, results) -> AsyncIterator[httpx.AsyncClient]:
    """Of the API, with a worker at work beside it."""
    write_artifact(settings.artifacts[0] / "start", film("start", "required"))
    worker = Worker(settings, queue, results, Runner(find(settings.artifacts), toy.load, toy.test, settings, results))
    async with serving(create_app(settings, queue, results)) as client, at_work(worker):
        yield client


async def ended(client: httpx.AsyncClient, location: str) -> dict:
    async def job() -> dict | None:
        job = (await client.get(location)).json()
        return job if job["status"] not in ("queued", "running") else None

    return await until(job)


@pytest.mark.parametrize("way", ["file", "data URI", "URL"])
async def test_an_image_reaches_the_model_upright_whichever_way_it_came(client, there, way):
    prompt, content = {"prompt": "the picture comes to life"}, photograph()
    match way:
        case "file":
            answer = await client.post("/generate/video", data=prompt, files={"image": ("a.png", content)})
        case "data URI":
            uri = "data:image/png;base64," + base64.b64encode(content).decode()
            answer = await client.post("/generate/video", json=prompt | {"image": uri})
        case "URL":
            url = f"http://{ALLOWED}:{there.port}/a.png"
            answer = await client.post("/generate/video", json=prompt | {"image": url})
    assert answer.status_code == 202, answer.text
    job = await ended(client, answer.headers["location"])
    assert (job["status"], job["artifact"], job["request"]["image"]["bytes"]) == ("succeeded", "start", len(content))
    seen = await client.get(next(one["url"] for one in job["results"] if one["name"] == "start.png"))
    image = Image.open(io.BytesIO(seen.content))
    assert (image.size, image.mode) == ((20, 40), "RGB")
    assert (image.getpixel((10, 5)), image.getpixel((10, 35))) == (RED, GREEN)


async def test_an_image_that_breaks_when_it_is_decoded_fails_its_job_by_name(client):
    torn = encode(halves((80, 60)), "PNG")[:100]
    answer = await client.post("/generate/video", data={"prompt": "a"}, files={"image": ("a.png", torn)})
    job = await ended(client, answer.headers["location"])
    assert (job["status"], job["attempt"]) == ("failed", 1)
    assert (job["error"]["type"], job["error"]["field"]) == ("urn:lowbit:problem:bad-input", "image")


async def test_an_image_goes_with_its_job(settings, queue, results):
    write_artifact(settings.artifacts[0] / "start", film("start", "required"))
    soon = with_settings(queue, job_ttl_seconds=0.05)
    async with serving(create_app(settings, soon, results)) as client:
        answer = await client.post("/generate/video", data={"prompt": "a"}, files={"image": ("a.png", photograph())})
        kept = settings.data / "results" / answer.json()["request"]["image"]["path"]
        assert kept.read_bytes() == photograph()
        await client.delete(answer.headers["location"])
        await asyncio.sleep(0.1)
        await remove_old(soon, results)
        assert not kept.exists()
