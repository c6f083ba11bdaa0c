"""The whole of the API: its description, and how it behaves while the queue server is away."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from service import metrics
from service.api import problems
from service.api.app import create_app
from service.jobs import Progress
from service.queue.client import Queue
from service.queue.embedded import EmbeddedServer
from service.settings import StartError
from tests.service.api.routes.test_generate import REQUEST
from tests.service.api.routes.test_jobs import follow
from tests.service.api.routes.test_reconstruct import PNG, images
from tests.service.queue.test_client import RESULT, claim, submit, with_settings
from tests.service.queue.test_embedded import process_id
from tests.service.support import new_id, serving, until


async def test_every_error_answer_is_declared_as_a_problem(client):
    openapi = (await client.get("/openapi.json")).json()
    declared = {
        (path, status): response
        for path, methods in openapi["paths"].items()
        for method in methods.values()
        for status, response in method["responses"].items()
        if int(status) >= 400
    }
    for response in declared.values():
        assert response["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert {status for path, status in declared if path == "/generate/video"} == {
        "400", "409", "413", "415", "422", "429", "500", "503",
    }  # fmt: skip
    assert "HTTPValidationError" not in openapi["components"]["schemas"]
    assert "Problem" in openapi["components"]["schemas"]
    assert (await client.get("/docs")).status_code == 200


async def test_a_fault_of_ours_is_a_problem_too(settings, queue, results, artifacts):
    app = create_app(settings, queue, results)

    @app.get("/fault")
    async def fault() -> None:
        raise ZeroDivisionError

    async with serving(app) as client:
        response = await client.get("/fault")
    assert (response.status_code, response.json()["type"]) == (500, "urn:lowbit:problem:internal")


async def test_types_of_problems_have_one_status_each():
    assert all(400 <= status < 600 and title for status, title in problems.TYPES.values())


async def test_two_artifacts_of_one_name_are_refused_at_the_start(settings, queue, results, artifacts):
    (artifacts / "copy").mkdir()
    (artifacts / "copy" / "manifest.json").write_bytes((artifacts / "film" / "manifest.json").read_bytes())
    with pytest.raises(StartError, match="both named 'film'"):
        create_app(settings, queue, results)


async def test_without_any_artifact_there_is_nothing_to_run_a_job_with(settings, queue, results):
    async with serving(create_app(settings, queue, results)) as client:
        response = await client.post("/generate/video", json=REQUEST)
    assert (response.status_code, response.json()["type"]) == (503, "urn:lowbit:problem:no-artifact")


async def test_while_the_queue_server_is_away_every_answer_is_503_at_once(settings, results, artifacts, tmp_path):
    async with (
        Queue.open(f"unix://{tmp_path}/nobody.sock", settings) as away,
        serving(create_app(settings, away, results)) as client,
    ):
        asked = [
            client.post("/generate/video", json=REQUEST),
            client.post("/reconstruct/3d", files=images(PNG, PNG)),
            client.get(f"/jobs/{new_id()}"),
            client.get(f"/jobs/{new_id()}/events"),
            client.delete(f"/jobs/{new_id()}"),
            client.get("/jobs"),
            client.get("/readyz"),
        ]
        for question in asked:
            started = time.monotonic()
            response = await question
            assert (response.status_code, response.json()["type"]) == (503, "urn:lowbit:problem:queue-unavailable")
            assert int(response.headers["retry-after"]) > 0
            assert time.monotonic() - started < 10.0  # not the twenty of a client that is patient
        assert (await client.post("/generate/video", json={"prompt": ""})).status_code == 422
        assert (await client.get("/livez")).status_code == 200
        assert [a["name"] for a in (await client.get("/artifacts")).json()] == ["film", "room"]
        assert "lowbit_queue_up 0.0" in (await client.get("/metrics")).text


async def test_a_server_that_hangs_is_503_within_seconds(settings, results, artifacts, tmp_path):
    with EmbeddedServer(tmp_path) as server:
        async with Queue.open(server.url, settings) as queue, serving(create_app(settings, queue, results)) as client:
            assert (await client.get("/readyz")).status_code == 200
            pid = process_id(server)
            os.kill(pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                assert (await client.get("/readyz")).status_code == 503
                assert time.monotonic() - started < 10.0  # it hangs for as long as it is stopped
            finally:
                os.kill(pid, signal.SIGCONT)
            assert (await client.get("/readyz")).status_code == 200


async def test_the_api_and_a_stream_of_events_survive_the_server(settings, results, artifacts, tmp_path):
    with EmbeddedServer(tmp_path) as server:
        async with Queue.open(server.url, settings) as queue, serving(create_app(settings, queue, results)) as client:
            job_id = await submit(queue)
            patient = with_settings(queue, lease_seconds=60)
            lease = await claim(patient)
            await patient.renew(lease, Progress(step=1, of=2))
            watching = asyncio.create_task(follow(client, job_id))
            await until(lambda: metrics.event_streams._value.get() == 1)
            os.kill(process_id(server), signal.SIGKILL)
            await until(lambda: _is_ready(client))
            await patient.renew(lease, Progress(step=2, of=2))
            await queue.finish(lease, [RESULT])
            async with asyncio.timeout(10):
                events = await watching
            assert [number for number, _, _ in events] == [1, 2, 3, 4, 5]
            assert (await client.post("/generate/video", json=REQUEST)).status_code == 202


async def _is_ready(client) -> bool:
    return (await client.get("/readyz")).status_code == 200
