from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.jobs import SelfTest
from tests.service.queue.test_client import claim, submit
from tests.service.support import film, room


async def samples(client) -> dict[tuple, float]:
    text = (await client.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


async def test_alive_and_ready(client, queue):
    await submit(queue)
    assert (await client.get("/livez")).json() == {"status": "alive"}
    assert (await client.get("/readyz")).json() == {"status": "ready", "workers": 0, "waiting": 1, "refused": []}


async def test_ready_names_the_artifacts_that_a_worker_refuses(client, queue):
    tested = {name: SelfTest(verdict=name, device="cpu", seconds=1) for name in ("passed", "refused")}
    await queue.beat("w1", [film(), room()], {"film": tested["refused"], "room": tested["passed"]})
    assert (await client.get("/readyz")).json()["refused"] == ["film"]


async def test_metrics_tell_the_queue_as_it_is_now(client, queue):
    await submit(queue)
    await submit(queue)
    await claim(queue)
    found = await samples(client)
    assert found["lowbit_queue_up",] == 1
    assert found["lowbit_queue_depth", ("artifact", "film")] == 1
    assert found["lowbit_queue_running",] == 1
    assert found["lowbit_queue_oldest_age_seconds", ("artifact", "film")] >= 0


async def test_requests_are_counted_by_route_and_never_by_id(client, queue):
    route = ("code", "200"), ("method", "GET"), ("route", "/jobs/{job_id}")
    before = (await samples(client)).get(("lowbit_http_requests_total", *route), 0)
    for _ in range(3):
        await client.get(f"/jobs/{await submit(queue)}")
    await client.get("/no/such/path")
    await client.request("BREW", "/livez")
    after = await samples(client)
    assert after["lowbit_http_requests_total", *route] == before + 3
    labels = [label for name, *labels in after if name.startswith("lowbit_http") for label in labels]
    assert {value for name, value in labels if name == "method"} <= {"GET", "POST", "DELETE", "PUT", "PATCH", "other"}
    assert ("route", "unmatched") in labels
    assert not [value for _, value in labels if "/no/such" in value]
