"""Reading, listing, following and cancelling jobs over HTTP."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from service import metrics
from service.jobs import Progress, Reason, failure
from tests.service.queue.test_client import RESULT, claim, submit
from tests.service.support import new_id, until


async def follow(client: httpx.AsyncClient, job_id: str, after: int | None = None) -> list[tuple[int, str, dict]]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    events = []
    async with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if line:
                event[name] = value
            elif "data" in event:
                events.append((int(event["id"]), event["event"], json.loads(event["data"])))
                event = {}
    return events


@pytest.mark.parametrize("path", ["", "/events", "/result/video.mp4"])
@pytest.mark.parametrize("job_id", ["nonsense", "0" * 31, "0" * 32, "..%2f..%2fetc", "%00", "A" * 32])
async def test_a_job_id_that_is_none_is_a_problem(client, job_id, path):
    response = await client.get(f"/jobs/{job_id}{path}")
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert response.json()["type"] in ("urn:lowbit:problem:job-not-found", "urn:lowbit:problem:not-found")


async def test_a_job_shows_all_its_life(client, queue):
    job_id = await submit(queue)
    assert (await client.get(f"/jobs/{job_id}")).json()["position"] == 0
    lease = await claim(queue)
    await queue.renew(lease, Progress(step=1, of=4))
    job = (await client.get(f"/jobs/{job_id}")).json()
    assert (job["status"], job["attempt"], job["progress"], job["position"]) == (
        "running",
        1,
        {"step": 1, "of": 4},
        None,
    )
    await queue.finish(lease, [RESULT])
    job = (await client.get(f"/jobs/{job_id}")).json()
    assert job["results"] == [json.loads(RESULT.model_dump_json())]
    assert set(job) == {
        "id", "kind", "status", "artifact", "request", "created_at", "started_at", "finished_at", "attempt", "progress",
        "kernels", "position", "results", "error",
    }  # fmt: skip
    assert job["created_at"].endswith("Z")


async def test_a_failed_job_says_why_as_a_problem(client, queue):
    job_id = await submit(queue)
    await queue.fail(await claim(queue), failure(Reason.BAD_INPUT, "image 2 is black", "images"), retry=False)
    job = (await client.get(f"/jobs/{job_id}")).json()
    assert job["status"] == "failed"
    assert (job["error"]["type"], job["error"]["field"]) == ("urn:lowbit:problem:bad-input", "images")


async def test_pages_list_every_job_newest_first(client, queue):
    ids = [await submit(queue) for _ in range(5)]
    first = (await client.get("/jobs", params={"limit": 3})).json()
    second = (await client.get("/jobs", params={"limit": 3, "cursor": first["next"]})).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]
    assert second["next"] is None


@pytest.mark.parametrize(("query", "field"), [("limit=0", "limit"), ("limit=101", "limit"), ("cursor=x", "cursor")])
async def test_a_page_that_is_none_is_refused(client, query, field):
    response = await client.get(f"/jobs?{query}")
    assert (response.status_code, response.json()["field"]) == (422, field)


async def test_cancelling_a_queued_job_ends_it_at_once(client, queue):
    job_id = await submit(queue)
    for _ in range(2):  # the second time changes nothing
        response = await client.delete(f"/jobs/{job_id}")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")


async def test_cancelling_a_running_job_is_a_promise(client, queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    response = await client.delete(f"/jobs/{job_id}")
    assert (response.status_code, response.json()["status"]) == (202, "running")
    assert await queue.finish(lease, [RESULT]) == "cancelled"
    assert (await client.get(f"/jobs/{job_id}")).json()["status"] == "cancelled"


async def test_cancelling_what_has_ended_or_never_was_is_a_problem(client, queue):
    job_id = await submit(queue)
    await queue.finish(await claim(queue), [RESULT])
    response = await client.delete(f"/jobs/{job_id}")
    assert (response.status_code, response.json()["type"]) == (409, "urn:lowbit:problem:job-ended")
    assert (await client.delete(f"/jobs/{new_id()}")).status_code == 404


async def test_events_come_as_they_happen_and_end_with_the_job(client, queue):
    job_id = await submit(queue)
    watching = asyncio.create_task(follow(client, job_id))
    await until(lambda: _waits_for_events(queue))
    lease = await claim(queue)
    for step in (1, 2):
        await queue.renew(lease, Progress(step=step, of=2))
    await queue.finish(lease, [RESULT])
    async with asyncio.timeout(4):  # below the poll: the bell rang
        events = await watching
    assert [(number, name) for number, name, _ in events] == [
        (1, "status"), (2, "status"), (3, "progress"), (4, "progress"), (5, "done"),
    ]  # fmt: skip
    assert events[2][2] == {"step": 1, "of": 2, "attempt": 1}
    assert events[4][2] == (await client.get(f"/jobs/{job_id}")).json()


async def _waits_for_events(queue) -> bool:
    return bool(await queue.redis.pubsub_numpat())


async def test_events_are_replayed_after_the_last_one_seen(client, queue):
    job_id = await submit(queue)
    await queue.finish(await claim(queue), [RESULT])
    assert [number for number, _, _ in await follow(client, job_id)] == [1, 2, 3]
    assert [number for number, _, _ in await follow(client, job_id, after=1)] == [2, 3]


async def test_a_follower_that_has_seen_all_is_told_not_to_come_again(client, queue):
    job_id = await submit(queue)
    await queue.finish(await claim(queue), [RESULT])
    response = await client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "3"})
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("after", ["x", "-1", str(2**53), str(2**64)])
async def test_a_last_event_id_that_is_none_is_refused(client, queue, after):
    response = await client.get(f"/jobs/{await submit(queue)}/events", headers={"Last-Event-ID": after})
    assert (response.status_code, response.json()["field"]) == (422, "last-event-id")


async def test_a_follower_who_leaves_is_forgotten(client, queue):
    async with client.stream("GET", f"/jobs/{await submit(queue)}/events") as response:
        await anext(response.aiter_lines())
        assert metrics.event_streams._value.get() == 1
    await until(lambda: metrics.event_streams._value.get() == 0)
