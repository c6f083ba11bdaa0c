"""POST /generate/video: what is accepted, and what each wrong request is told."""

from __future__ import annotations

import json

import pytest

from service.jobs import MAX_SEED
from tests.service.support import film, new_id

REQUEST = {"prompt": "a red ball rolls to the left"}


def names(problem: dict) -> set[str]:
    return {error["field"] for error in problem["errors"]}


async def test_a_prompt_alone_makes_a_job_that_is_fully_determined(client):
    response = await client.post("/generate/video", json=REQUEST)
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["artifact"], job["attempt"], job["position"]) == ("queued", "film", 0, 0)
    seed = job["request"].pop("seed")
    assert 0 <= seed <= MAX_SEED
    assert job["request"] == {
        "prompt": REQUEST["prompt"], "negative_prompt": "", "artifact": "film", "width": 64, "height": 48, "frames": 9,
        "fps": 16, "steps": 4, "guidance": 5.0, "image": None,
    }  # fmt: skip
    assert (await client.get(response.headers["location"])).json()["request"]["seed"] == seed


async def test_what_is_given_is_kept(client):
    given = {
        "width": 96,
        "height": 32,
        "frames": 13,
        "fps": 12,
        "steps": 7,
        "guidance": 0,
        "seed": 5,
        "artifact": "film",
    }
    job = (await client.post("/generate/video", json=REQUEST | given)).json()
    assert {name: job["request"][name] for name in given} == given


async def test_two_drawn_seeds_differ(client):
    seeds = [(await client.post("/generate/video", json=REQUEST)).json()["request"]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("change", "field", "hint"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "  \n "}, "prompt", "empty"),
        ({"prompt": "x" * 201}, "prompt", "200"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": "a\x00b"}, "prompt", "control"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"negative_prompt": "x" * 201}, "negative_prompt", "200"),
        ({"width": 65}, "width", "64 or 80"),
        ({"width": 0}, "width", "16"),
        ({"width": -16}, "width", "16"),
        ({"height": 336}, "height", "320"),
        ({"height": "48"}, "height", "integer"),
        ({"width": 320, "height": 208}, "width", "61440"),
        ({"frames": 10}, "frames", "9 or 13"),
        ({"frames": 0}, "frames", "1"),
        ({"frames": 37}, "frames", "33"),
        ({"frames": 9.5}, "frames", "integer"),
        ({"frames": True}, "frames", "integer"),
        ({"frames": 10**400}, "frames", "2147483648"),
        ({"fps": 0}, "fps", "1"),
        ({"fps": 61}, "fps", "60"),
        ({"steps": 0}, "steps", "50"),
        ({"steps": 51}, "steps", "50"),
        ({"guidance": -1}, "guidance", "0"),
        ({"guidance": 1e9}, "guidance", "50"),
        ({"seed": -1}, "seed", "0"),
        ({"seed": 2**53}, "seed", str(MAX_SEED)),
        ({"frmes": 9}, "frmes", "frames"),
        ({"artifact": "flim"}, "artifact", "film"),
        ({"artifact": "room"}, "artifact", "film"),
        ({"artifact": "../../etc"}, "artifact", "match"),
    ],
)
async def test_a_bad_field_is_refused_by_name_with_what_would_do(client, change, field, hint):
    response = await client.post("/generate/video", content=json.dumps(REQUEST | change), headers=JSON)
    problem = response.json()
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert (problem["type"], problem["status"]) == ("urn:lowbit:problem:invalid-request", 422)
    assert problem["field"] == field
    assert hint in problem["errors"][0]["message"]


JSON = {"content-type": "application/json"}


async def test_all_bad_fields_are_told_at_once(client):
    problem = (
        await client.post("/generate/video", json={"prompt": "", "width": 65, "frames": 10, "steps": 999})
    ).json()
    assert names(problem) == {"prompt", "width", "frames", "steps"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "slug"),
    [
        (b"{", JSON, 400, "malformed-body"),
        (b'{"prompt": "\xff\xfe"}', JSON, 400, "malformed-body"),
        (b"[" * 100_000, JSON, 400, "malformed-body"),
        (b"", JSON, 422, "invalid-request"),
        (b"[]", JSON, 422, "invalid-request"),
        (b'"text"', JSON, 422, "invalid-request"),
        (b'{"prompt": "x", "guidance": NaN}', JSON, 422, "invalid-request"),
        (b'{"prompt": "x", "guidance": 1e999}', JSON, 422, "invalid-request"),
        (b'{"prompt": "x"}', {}, 415, "unsupported-media-type"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415, "unsupported-media-type"),
        (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported-media-type"),
        (b'{"prompt": "x"}', {"content-type": "application/json; charset=utf-16"}, 415, "unsupported-media-type"),
        (b'{"prompt": "' + b"x" * 200_000 + b'"}', JSON, 413, "body-too-large"),
    ],
)
async def test_a_body_that_is_none_is_refused(client, body, headers, status, slug):
    response = await client.post("/generate/video", content=body, headers=headers)
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"urn:lowbit:problem:{slug}")
    assert problem["field"] == {415: "content-type", 422: problem["field"]}.get(status, "body")
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_chunked_body_over_the_limit_is_refused(client):
    async def chunks():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 4096

    response = await client.post("/generate/video", content=chunks(), headers=JSON)
    assert (response.status_code, response.json()["type"]) == (413, "urn:lowbit:problem:body-too-large")
    assert response.json()["field"] == "body"


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "utf8"])
async def test_a_body_may_say_that_it_is_utf_8(client, charset):
    headers = {"content-type": f"application/json; charset={charset}"}
    assert (await client.post("/generate/video", content=b'{"prompt": "x"}', headers=headers)).status_code == 202


async def test_an_idempotency_key_makes_a_repeated_request_the_same_job(client, queue):
    key = {"Idempotency-Key": "one"}
    answers = [await client.post("/generate/video", json=REQUEST, headers=key) for _ in range(2)]
    assert [a.status_code for a in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()  # the drawn seed too
    assert (await queue.stats()).waiting == 1
    other = await client.post("/generate/video", json=REQUEST | {"steps": 5}, headers=key)
    assert (other.status_code, other.json()["type"]) == (409, "urn:lowbit:problem:idempotency-conflict")
    assert other.json()["field"] == "idempotency-key"


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
async def test_an_idempotency_key_that_is_none_is_refused(client, key):
    response = await client.post("/generate/video", json=REQUEST, headers={"Idempotency-Key": key})
    assert (response.status_code, response.json()["field"]) == (422, "idempotency-key")


async def test_a_full_queue_answers_429_with_the_time_to_wait(client, queue):
    await queue.redis.zadd(queue.key("waiting"), {f"job-{i}": 2e15 for i in range(queue.settings.queue_bound)})
    response = await client.post("/generate/video", json=REQUEST)
    assert (response.status_code, response.json()["type"]) == (429, "urn:lowbit:problem:queue-full")
    assert int(response.headers["retry-after"]) >= 1


async def test_an_artifact_left_out_is_one_that_a_living_worker_can_run(client, queue):
    await queue.beat("w1", [film("second")])
    assert (await client.post("/generate/video", json=REQUEST)).json()["artifact"] == "second"
    by_name = await client.post("/generate/video", json=REQUEST | {"artifact": "film"})
    assert by_name.json()["artifact"] == "film"  # no worker has it: the job waits


@pytest.mark.parametrize("method", ["get", "put", "patch", "delete"])
async def test_other_methods_are_refused_as_problems(client, method):
    response = await getattr(client, method)("/generate/video")
    assert (response.status_code, response.json()["type"]) == (405, "urn:lowbit:problem:method-not-allowed")
    assert response.headers["allow"] == "POST"


async def test_an_unknown_path_is_a_problem(client):
    response = await client.get(f"/generate/{new_id()}")
    assert (response.status_code, response.json()["type"]) == (404, "urn:lowbit:problem:not-found")
