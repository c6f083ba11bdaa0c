"""One worker's loop against a real queue: what it commits, what it gives back, and what it lives through."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service import metrics
from service.artifacts import find
from service.jobs import Job, JobStatus, SelfTest
from service.queue.client import Lease, Queue
from service.queue.embedded import EmbeddedServer
from service.results import StorageError
from service.worker import loop
from service.worker.loop import UnusableError, Worker
from service.worker.runner import Runner
from tests.service.queue.test_client import lose_lease, with_settings
from tests.service.queue.test_embedded import process_id
from tests.service.support import film, new_id, until, video_task, write_artifact
from tests.service.worker import toy

Start = Callable[..., Worker]


@pytest.fixture
def make(settings, queue, results, artifacts) -> Start:
    def make(queue: Queue = queue, load=toy.load, test=toy.test) -> Worker:
        runner = Runner(find(settings.artifacts), load, test, queue.settings, results)
        return Worker(queue.settings, queue, results, runner)

    return make


@asynccontextmanager
async def at_work(worker: Worker) -> AsyncIterator[Worker]:
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.draining.set()
        async with asyncio.timeout(10):
            await task


async def submit(queue: Queue, prompt: str = "a ball", artifact: str = "film", steps: int = 4) -> str:
    task = video_task(artifact, prompt=prompt, steps=steps)
    return (await queue.enqueue(new_id(), "video", task)).job.id


async def reaches(queue: Queue, job_id: str, *wanted: JobStatus) -> Job:
    async def there() -> Job | None:
        job = await queue.get(job_id)
        return job if job.status in (wanted or tuple(s for s in JobStatus if s.ended)) else None

    return await until(there)


async def moves(queue: Queue, job_id: str) -> None:
    """Until it has reported a step."""

    async def moved() -> bool:
        return (await queue.get(job_id)).progress is not None

    await until(moved)


async def content(results, job: Job, name: str) -> bytes:
    return b"".join([chunk async for chunk in results.read(f"jobs/{job.id}/{job.attempt}/{name}")])


def kept(settings) -> list[str]:
    folder = settings.data / "results" / "jobs"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def count(metric, *labels: str) -> float:
    return (metric.labels(*labels) if labels else metric)._value.get()


async def test_a_job_ends_with_its_files_and_its_steps(make, queue, results):
    done = count(metrics.jobs_finished, "video", "film", "succeeded")
    async with at_work(make()):
        job = await reaches(queue, await submit(queue, steps=60))
    assert (job.status, job.attempt, job.error) == ("succeeded", 1, None)
    assert [(r.name, r.type, r.url) for r in job.results] == [
        ("video.mp4", "video/mp4", f"/jobs/{job.id}/result/video.mp4")
    ]
    assert await content(results, job, "video.mp4") == toy.film_of("a ball", 7, 60)
    steps = [event.data["step"] for event in await queue.events(job.id, 0) if event.name == "progress"]
    assert len(steps) >= 3
    assert steps == sorted(set(steps))
    assert count(metrics.jobs_finished, "video", "film", "succeeded") == done + 1


async def test_the_worker_tells_what_it_holds_and_takes_its_leave(make, queue):
    async with at_work(make()):
        await until(lambda: queue.artifacts())
        assert [(a.name, a.workers, a.kernels) for a in await queue.artifacts()] == [("film", 1, {}), ("room", 1, {})]
        await reaches(queue, await submit(queue))
        await until(lambda: _kernels(queue))
    assert [(a.name, a.workers) for a in await queue.artifacts()] == [("film", 0), ("room", 0)]


def finding(**verdicts: str) -> Callable[[Path, str, bool], SelfTest]:
    def test(path: Path, device: str, fallback: bool) -> SelfTest:
        verdict = verdicts.get(path.name, "passed")
        failures = {} if verdict == "passed" else {"linear_w8a8": "Triton is off by 0.5"}
        change = {"verdict": verdict, "failures": failures, "versions": {"linear_w8a8": "torch"}}
        return toy.test(path, device, fallback).model_copy(update=change)

    return test


async def test_a_refused_artifact_s_jobs_wait_and_artifacts_say_why(make, queue):
    async with at_work(worker := make(test=finding(film="refused"))):
        waiting = await submit(queue)
        await until(lambda: queue.artifacts())
        film, room = await queue.artifacts()
        assert (film.workers, room.workers) == (0, 1)
        assert film.tested[worker.name].failures == {"linear_w8a8": "Triton is off by 0.5"}
        assert count(metrics.artifact_selftest, "film", "refused") == 1
        assert (await queue.get(waiting)).status == "queued"
        async with at_work(make()):  # on another machine
            assert (await reaches(queue, waiting)).status == "succeeded"
            assert [one.workers for one in await queue.artifacts()] == [1, 2]
    assert [one.tested for one in await queue.artifacts()] == [{}, {}]


async def test_a_worker_that_has_nothing_to_run_stays_and_says_so_until_it_is_told_to_go(make, queue):
    async with at_work(worker := make(test=finding(film="refused", room="refused"))):
        await until(lambda: count(metrics.worker_state, "refused"))
        job_id = await submit(queue)
        await until(lambda: queue.artifacts())
        assert [list(one.tested) for one in await queue.artifacts()] == [[worker.name]] * 2
        assert (await queue.get(job_id)).status == "queued"
    assert count(metrics.worker_state, "draining") == 1


async def test_a_worker_is_not_heard_of_before_its_test_has_ended_and_can_be_told_to_go_in_it(make, queue):
    begun, go = threading.Event(), threading.Event()

    def slow(path: Path, device: str, fallback: bool) -> SelfTest:
        begun.set()
        go.wait(10)
        return toy.test(path, device, fallback)

    async with at_work(make(test=slow)):
        await until(begun.is_set)
        assert await queue.artifacts() == []
    assert not go.is_set()
    go.set()


async def test_a_worker_whose_test_has_no_end_is_given_up(make, queue):
    queue.settings = queue.settings.model_copy(update={"stall_seconds": 0.2})
    go = threading.Event()
    worker = make(test=lambda path, device, fallback: go.wait(10) and toy.test(path, device, fallback))
    with pytest.raises(UnusableError, match=r"not ended in 0\.2 s"):
        await worker.run()
    go.set()
    assert await queue.artifacts() == []


async def test_patience_with_a_test_begins_anew_with_each_artifact_and_what_hangs_is_named(make, queue):
    queue.settings = queue.settings.model_copy(update={"stall_seconds": 0.6})
    go, hangs = threading.Event(), []

    def slow(path: Path, device: str, fallback: bool) -> SelfTest:
        if path.name in hangs:
            go.wait(10)
        time.sleep(0.4)
        return toy.test(path, device, fallback)

    async with at_work(make(test=slow)):  # 0.8 s in all
        await until(lambda: queue.artifacts())
    hangs.append("room")
    with pytest.raises(UnusableError, match=r"the self-test of room has not ended in 0\.6 s"):
        await make(test=slow).run()
    go.set()


async def test_a_worker_that_is_short_of_memory_says_so_and_can_be_told_to_go(make, queue):
    queue.settings = queue.settings.model_copy(update={"backoff_seconds": 60, "backoff_max_seconds": 60})

    def short(path: Path, device: str, fallback: bool) -> SelfTest:
        raise toy.OutOfMemoryError("others hold it")

    async with at_work(make(test=short)):
        await until(lambda: count(metrics.worker_state, "short-of-memory"))
        assert await queue.artifacts() == []


async def test_what_fell_back_is_in_the_metrics_and_in_the_job_s_record(make, queue):
    async with at_work(make(test=finding(film="fallback"))):
        job = await reaches(queue, await submit(queue))
    assert job.kernels == {"int8": "toy"}, "what the generator says it ran by"
    assert count(metrics.kernel_version, "linear_w8a8", "torch") == 1
    assert count(metrics.artifact_selftest, "film", "fallback") == 1
    assert count(metrics.artifact_selftest, "room", "passed") == 1
    assert count(metrics.selftest_seconds, "film") == 0.25


async def _kernels(queue: Queue) -> bool:
    return (await queue.artifacts())[0].kernels == {"int8": "toy"}


@pytest.mark.parametrize(
    ("prompt", "kind", "field"),
    [("refuse", "bad-input", "prompt"), ("break", "model-error", None), ("too large", "out-of-memory", None)],
)
async def test_a_job_that_fails_says_why_and_the_worker_lives_on(make, queue, settings, prompt, kind, field):
    async with at_work(make()):
        failed = await reaches(queue, await submit(queue, prompt))
        after = await reaches(queue, await submit(queue))
    assert (failed.status, failed.attempt) == ("failed", 1)
    assert (failed.error.type, failed.error.field) == (f"urn:lowbit:problem:{kind}", field)
    assert (after.status, after.attempt) == ("succeeded", 1)


async def test_after_running_out_of_memory_the_model_is_loaded_afresh(make, queue):
    loaded = []
    async with at_work(make(load=lambda path, device: loaded.append(path) or toy.load(path, device))):
        for prompt in ("a ball", "another", "too large", "a third"):
            await reaches(queue, await submit(queue, prompt))
    assert len(loaded) == 2


async def test_a_store_that_fails_once_costs_an_attempt_and_not_the_job(make, queue, results, monkeypatch, settings):
    put, calls = results.put, []

    async def put_late(path, source):
        calls.append(path)
        if len(calls) == 1:
            raise StorageError("the bucket is away")
        return await put(path, source)

    monkeypatch.setattr(results, "put", put_late)
    async with at_work(make()):
        job = await reaches(queue, await submit(queue))
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert kept(settings) == [f"{job.id}/2/video.mp4"]


async def test_a_store_that_never_works_ends_the_job_with_that_reason(make, queue, results, monkeypatch):
    async def put(path, source):
        raise StorageError("the bucket is away")

    monkeypatch.setattr(results, "put", put)
    async with at_work(make()):
        job = await reaches(queue, await submit(queue))
    assert (job.status, job.attempt, job.error.type) == ("failed", 3, "urn:lowbit:problem:storage")
    assert await queue.redis.zrange(queue.key("dead"), 0, -1) == [job.id]


async def test_cancelling_stops_at_the_next_step(make, queue, settings):
    async with at_work(make()):
        job_id = await submit(queue, steps=100)
        await moves(queue, job_id)
        await queue.cancel(job_id)
        job = await reaches(queue, job_id)
        assert (await reaches(queue, await submit(queue))).status == "succeeded"
    assert (job.status, job.results) == ("cancelled", ())
    assert job.progress.step < 100


async def taken_away(queue: Queue, job_id: str) -> Lease:
    """Another worker's lease on a job that was running; its own may renew just between the loss and the claim."""
    patient = with_settings(queue, lease_seconds=30)
    while True:
        await lose_lease(queue, type("L", (), {"job": await queue.get(job_id)}))
        lease = (await patient.claim("another", "", ["film"])).lease
        if lease is not None:
            return lease


async def test_a_worker_that_lost_its_job_leaves_no_trace_of_it(make, queue, settings):
    async with at_work(make()):
        job_id = await submit(queue, steps=30)
        await moves(queue, job_id)
        lost = count(metrics.worker_lease_lost)
        fresh = await taken_away(queue, job_id)
        assert (fresh.job.id, fresh.job.attempt) == (job_id, 2)
        await until(lambda: count(metrics.worker_lease_lost) == lost + 1)
        assert (await reaches(queue, await submit(queue))).status == "succeeded"
    assert await queue.renew(fresh) == "ok"
    assert not [path for path in kept(settings) if path.startswith(job_id)]


async def test_a_result_that_comes_too_late_is_refused_and_removed(make, queue, results, settings, monkeypatch):
    suppressed = count(metrics.duplicates_suppressed)
    fresh = []
    put = results.put

    async def put_and_lose(path, source):
        stored = await put(path, source)
        if not fresh:
            fresh.append(await taken_away(queue, path.split("/")[1]))
        return stored

    monkeypatch.setattr(results, "put", put_and_lose)
    async with at_work(make()):
        job_id = await submit(queue)
        await until(lambda: count(metrics.duplicates_suppressed) == suppressed + 1)
    assert (await queue.get(job_id)).attempt == 2
    assert kept(settings) == []
    assert await queue.finish(fresh[0], []) == "ok"


async def test_a_model_that_hangs_loses_the_job_and_the_worker_gives_up(make, queue):
    stalled = count(metrics.job_failures, "stalled")
    worker = make(with_settings(queue, stall_seconds=0.5))
    job_id = await submit(queue, "hang")
    with pytest.raises(UnusableError, match="does not come to its next step"):
        async with asyncio.timeout(10):
            await worker.run()
    job = await queue.get(job_id)
    assert (job.status, job.attempt) == ("queued", 1)
    assert count(metrics.job_failures, "stalled") == stalled + 1


async def test_a_lost_device_gives_the_job_back_and_the_worker_up(make, queue):
    job_id = await submit(queue, "lose the device")
    with pytest.raises(UnusableError, match="CUDA error"):
        async with asyncio.timeout(10):
            await make().run()
    assert (await queue.get(job_id)).status == "queued"


async def test_an_artifact_that_cannot_be_loaded_is_offered_no_more(make, queue, artifacts, settings):
    def load_some(path, device):
        if path.name == "film":
            raise OSError("block 3 is damaged")
        return toy.load(path, device)

    write_artifact(artifacts / "other", film("other"))
    async with at_work(make(load=load_some)) as worker:
        job_id = await submit(queue)
        await until(lambda: "film" not in worker.runner.infos)
        assert (await reaches(queue, await submit(queue, artifact="other"))).status == "succeeded"
    assert (await queue.get(job_id)).status == "queued"
    async with at_work(make()):  # another one, whose copy is whole
        assert (await reaches(queue, job_id)).attempt == 2


async def test_a_draining_worker_ends_its_job_and_takes_no_other(make, queue):
    worker = make()
    async with at_work(worker):
        job_id = await submit(queue, steps=100)
        await moves(queue, job_id)
        waiting = await submit(queue)
        worker.draining.set()
    assert (await queue.get(job_id)).status == "succeeded"
    assert (await queue.get(waiting)).status == "queued"


async def test_a_job_that_outlasts_the_drain_is_given_back_to_its_place(make, queue):
    worker = make(with_settings(queue, drain_seconds=0.1, max_attempts=1))
    async with at_work(worker):
        job_id = await submit(queue, steps=200)
        await moves(queue, job_id)
        worker.draining.set()
    job = await queue.get(job_id)
    assert (job.status, job.position, job.progress) == ("queued", 0, None)


async def test_a_model_that_hangs_does_not_hold_up_the_drain(make, queue, monkeypatch):
    monkeypatch.setattr(loop, "OBEY_SECONDS", 0.3)
    worker = make(with_settings(queue, drain_seconds=0.1))
    job_id = await submit(queue, "hang")
    running = asyncio.create_task(worker.run())
    await moves(queue, job_id)
    worker.draining.set()
    with pytest.raises(UnusableError):
        async with asyncio.timeout(5):
            await running
    assert (await queue.get(job_id)).status == "queued"


async def test_the_loaded_model_goes_first(make, queue, artifacts):
    write_artifact(artifacts / "other", film("other"))
    order = []
    for artifact in ("film", "other", "film", "other"):
        await submit(queue, artifact=artifact)
    async with at_work(make(load=lambda path, device: order.append(path.name) or toy.load(path, device))):
        await until(lambda: _all_ended(queue))
    assert order == ["film", "other"]


async def _all_ended(queue: Queue) -> bool:
    return all(job.status.ended for job in (await queue.page("", 100))[0])


async def test_two_workers_share_the_work_and_do_nothing_twice(make, queue, settings):
    ids = [await submit(queue, f"number {i}") for i in range(8)]
    async with at_work(make()), at_work(make()):
        jobs = [await reaches(queue, job_id) for job_id in ids]
    assert {(job.status, job.attempt) for job in jobs} == {(JobStatus.SUCCEEDED, 1)}
    assert len(kept(settings)) == 8


async def test_the_worker_and_its_job_outlive_the_queue_server(settings, results, artifacts, tmp_path):
    with EmbeddedServer(tmp_path) as server:
        async with Queue.open(server.url, settings) as queue:
            runner = Runner(find(settings.artifacts), toy.load, toy.test, settings, results)
            async with at_work(Worker(settings, queue, results, runner)):
                job_id = await submit(queue, steps=50)
                await moves(queue, job_id)
                os.kill(process_id(server), signal.SIGKILL)
                await until(lambda: answers(queue))
                job = await reaches(queue, job_id)
                assert (job.status, job.attempt) == ("succeeded", 1)
                assert await content(results, job, "video.mp4") == toy.film_of("a ball", 7, 50)
                await until(lambda: _published(queue))
                assert (await reaches(queue, await submit(queue))).status == "succeeded"


async def answers(queue: Queue) -> bool:
    try:
        await queue.stats()
    except loop.UnavailableError:
        return False
    return True


async def _published(queue: Queue) -> bool:
    return [info.workers for info in await queue.artifacts()] == [1, 1]


async def test_a_job_that_ends_while_the_server_is_away_is_committed_when_it_is_back(
    settings, results, artifacts, tmp_path
):
    with EmbeddedServer(tmp_path) as server:
        async with Queue.open(
            server.url, settings.model_copy(update={"lease_seconds": 0.6, "beat_seconds": 0.2})
        ) as queue:
            runner = Runner(find(settings.artifacts), toy.load, toy.test, settings, results)
            async with at_work(Worker(settings, queue, results, runner)):
                job_id = await submit(queue, steps=10)
                await moves(queue, job_id)
                pid = process_id(server)
                os.kill(pid, signal.SIGSTOP)  # away for longer than the lease
                await asyncio.sleep(1.5)
                os.kill(pid, signal.SIGCONT)
                job = await reaches(queue, job_id)
                assert (job.status, job.attempt) == ("succeeded", 1)
