"""The queue's promises, on a real server."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from structlog.testing import capture_logs

from service.jobs import JobStatus, Progress, Reason, Result, SelfTest, failure
from service.queue import client
from service.queue.client import ConflictError, FullError, Idempotency, Lease, Queue, UnavailableError
from tests.service.support import film, new_id, room, scene_task, until, video_task

RESULT = Result(name="video.mp4", type="video/mp4", bytes=3, sha256="a" * 64, url="/jobs/x/result/video.mp4")
TRANSIENT = failure(Reason.STORAGE, "the bucket is away")


def with_settings(queue: Queue, **change: object) -> Queue:
    return Queue(queue.redis, queue.settings.model_copy(update=change))


async def submit(queue: Queue, artifact: str = "film") -> str:
    return (await queue.enqueue(new_id(), "video", video_task(artifact))).job.id


async def claim(
    queue: Queue, worker: str = "w1", hot: str = "", artifacts: tuple[str, ...] = ("film", "room")
) -> Lease:
    lease = (await queue.claim(worker, hot, artifacts)).lease
    assert lease is not None
    return lease


async def status(queue: Queue, job_id: str) -> JobStatus:
    job = await queue.get(job_id)
    assert job is not None
    return job.status


async def lose_lease(queue: Queue, lease: Lease) -> None:
    """As if the worker had fallen silent for longer than its lease."""
    await queue.redis.zadd(queue.key("leases"), {lease.job.id: 1})


# Submitting


async def test_a_job_goes_from_queued_to_running_to_succeeded(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    assert (lease.job.id, lease.job.status, lease.job.attempt) == (job_id, "running", 1)
    assert await queue.renew(lease, Progress(step=1, of=4)) == "ok"
    assert await queue.finish(lease, [RESULT]) == "ok"
    job = await queue.get(job_id)
    assert (job.status, job.results, job.progress) == ("succeeded", (RESULT,), Progress(step=4, of=4))
    assert job.created_at <= job.started_at <= job.finished_at


async def test_the_same_id_twice_is_one_job(queue):
    job_id = new_id()
    answers = [await queue.enqueue(job_id, "video", video_task()) for _ in range(2)]
    assert [a.created for a in answers] == [True, False]
    assert (await queue.stats()).waiting == 1


async def test_the_same_idempotency_key_and_fingerprint_is_the_same_job(queue):
    same = Idempotency("key", "fingerprint")
    answers = await asyncio.gather(*(queue.enqueue(new_id(), "video", video_task(), same) for _ in range(20)))
    assert len({a.job.id for a in answers}) == 1
    assert sum(a.created for a in answers) == 1


async def test_an_idempotency_key_with_another_fingerprint_is_a_conflict(queue):
    first = await queue.enqueue(new_id(), "video", video_task(), Idempotency("key", "one"))
    with pytest.raises(ConflictError) as error:
        await queue.enqueue(new_id(), "video", video_task(), Idempotency("key", "two"))
    assert error.value.job == first.job.id
    with pytest.raises(ConflictError):
        await queue.precheck("film", Idempotency("key", "two"))
    assert (await queue.precheck("film", Idempotency("key", "one"))).job.id == first.job.id


async def test_the_bound_refuses_and_tells_the_measured_time_to_a_free_place(queue):
    bounded = with_settings(queue, queue_bound=1)
    job_id = await submit(bounded)
    lease = await claim(bounded)
    started = await queue.redis.hget(queue.key("job", job_id), "started")
    await queue.redis.hset(
        queue.key("job", job_id), "started", int(started) - 8000
    )  # as if it had run for eight seconds
    await bounded.finish(lease, [])
    await bounded.beat("w1", [film()])
    await bounded.beat("w2", [film()])
    await submit(bounded)
    for attempt in (submit(bounded), bounded.precheck("film", None)):
        with pytest.raises(FullError) as error:
            await attempt
        assert error.value.seconds == pytest.approx(4.0, abs=0.5)  # two workers: one place every four seconds


async def test_a_job_that_comes_back_is_taken_even_by_a_full_queue(queue):
    bounded = with_settings(queue, queue_bound=1)
    await submit(bounded)
    lease = await claim(bounded)
    await submit(bounded)
    assert await bounded.fail(lease, TRANSIENT, retry=True) == "retry"
    assert (await bounded.stats()).waiting == 2


# Order


async def test_priority_goes_before_the_hot_model_and_that_before_age(queue):
    old, warm = await submit(queue, "film"), await submit(queue, "other")
    urgent = (await queue.enqueue(new_id(), "scene", scene_task("room"))).job.id
    order = [(await claim(queue, f"w{i}", "other", ("film", "other", "room"))).job.id for i in range(3)]
    assert order == [urgent, warm, old]


async def test_affinity_does_not_starve_a_job_of_another_model(queue):
    impatient = with_settings(queue, affinity_seconds=0)
    old = await submit(impatient, "film")
    await submit(impatient, "other")
    await asyncio.sleep(0.01)
    assert (await claim(impatient, hot="other", artifacts=("film", "other"))).job.id == old


async def test_a_worker_is_given_only_what_it_can_run(queue):
    await submit(queue, "film")
    assert (await queue.claim("w1", "", ["room"])).lease is None


async def test_positions_count_the_jobs_ahead_for_the_same_artifact(queue):
    ids = [await submit(queue) for _ in range(3)]
    assert [(await queue.get(i)).position for i in ids] == [0, 1, 2]
    await claim(queue)
    assert [(await queue.get(i)).position for i in ids] == [None, 0, 1]


async def test_a_waiting_worker_wakes_when_a_job_arrives(queue, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_SECONDS", 25.0)
    started = time.monotonic()
    waiting = asyncio.create_task(queue.wake(["film"], 20.0))
    await asyncio.sleep(0.1)
    await submit(queue)
    await waiting
    assert time.monotonic() - started < 10.0  # it would have been 20 without the wake-up


# Leases


async def test_a_lost_lease_puts_the_job_back_at_its_old_place(queue):
    ids = [await submit(queue) for _ in range(3)]
    await lose_lease(queue, await claim(queue))
    second = await claim(queue, "w2")
    assert (second.job.id, second.job.attempt) == (ids[0], 2)


async def test_a_lease_runs_out_by_itself(queue):
    brief = with_settings(queue, lease_seconds=1)
    await submit(brief)
    await claim(brief)
    assert (await brief.claim("w2", "", ["film"])).lease is None
    await asyncio.sleep(1.1)
    assert (await claim(brief, "w2")).job.attempt == 2


async def test_a_beat_keeps_the_lease(queue):
    brief = with_settings(queue, lease_seconds=1.5)
    await submit(brief)
    lease = await claim(brief)
    for _ in range(5):
        await asyncio.sleep(0.4)
        assert await brief.renew(lease) == "ok"
    assert (await brief.claim("w2", "", ["film"])).lease is None


async def test_a_fenced_attempt_can_change_nothing(queue):
    job_id = await submit(queue)
    stale = await claim(queue)
    await lose_lease(queue, stale)
    fresh = await claim(queue, "w2")
    assert await queue.renew(stale, Progress(step=3, of=4)) == "lost"
    assert await queue.finish(stale, [RESULT]) == "lost"
    assert await queue.fail(stale, TRANSIENT, retry=True) == "lost"
    assert await queue.release(stale) == "lost"
    job = await queue.get(job_id)
    assert (job.status, job.attempt, job.progress, job.results) == ("running", 2, None, ())
    assert await queue.finish(fresh, [RESULT]) == "ok"
    assert await queue.finish(stale, []) == "lost"
    assert (await queue.get(job_id)).results == (RESULT,)


async def test_another_worker_cannot_use_the_attempt_of_the_owner(queue):
    await submit(queue)
    lease = await claim(queue)
    thief = Lease(lease.job, "thief", 0)
    assert await queue.finish(thief, [RESULT]) == "lost"
    assert await queue.renew(thief) == "lost"


async def test_a_worker_that_worked_on_through_an_outage_takes_its_job_back(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    await lose_lease(queue, lease)
    await queue.sweep()
    assert await status(queue, job_id) == "queued"
    assert await queue.renew(lease) == "ok"
    assert await status(queue, job_id) == "running"
    assert (await queue.claim("w2", "", ["film"])).lease is None
    assert await queue.finish(lease, [RESULT]) == "ok"
    assert (await queue.get(job_id)).attempt == 1


async def test_finishing_after_the_lease_ran_out_commits_if_nobody_else_began(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    await lose_lease(queue, lease)
    await queue.sweep()
    assert await queue.finish(lease, [RESULT]) == "ok"
    assert await status(queue, job_id) == "succeeded"
    assert (await queue.claim("w2", "", ["film"])).lease is None


async def test_a_claim_whose_answer_was_lost_is_answered_again(queue):
    await submit(queue)
    await submit(queue)
    first, again = await claim(queue), await claim(queue)
    assert first.names == again.names
    assert (await queue.stats()).running == 1


async def test_a_job_that_keeps_losing_workers_ends_as_a_dead_letter(queue):
    job_id = await submit(queue)
    for attempt in range(queue.settings.max_attempts):
        lease = await claim(queue, f"w{attempt}")
        await lose_lease(queue, lease)
    swept = (await queue.claim("w9", "", ["film"])).swept
    job = await queue.get(job_id)
    assert [s.what for s in swept] == ["dead"]
    assert (job.status, job.error.type, job.attempt) == ("failed", "urn:lowbit:problem:worker-lost", 3)
    assert await queue.redis.zrange(queue.key("dead"), 0, -1) == [job_id]
    assert await queue.renew(lease) == "lost"


# Failing


async def test_a_passing_failure_is_tried_again_after_a_back_off_that_doubles(queue):
    slow = with_settings(queue, backoff_seconds=1, backoff_max_seconds=100, max_attempts=4)
    job_id = await submit(slow)
    delays = []
    for _ in range(3):
        lease = await claim(slow)
        assert await slow.fail(lease, TRANSIENT, retry=True) == "retry"
        due = float(await slow.redis.zscore(slow.key("delayed"), job_id))
        seconds, micros = await slow.redis.time()
        delays.append(round(due / 1000 - seconds - micros / 1e6))
        assert (await slow.claim("w1", "", ["film"])).lease is None
        await slow.redis.zadd(slow.key("delayed"), {job_id: 1})
    assert delays == [1, 2, 4]


async def test_a_failure_for_good_ends_the_job_with_its_reason(queue):
    job_id = await submit(queue)
    problem = failure(Reason.BAD_INPUT, "the images show nothing", "images")
    assert await queue.fail(await claim(queue), problem, retry=False) == "failed"
    job = await queue.get(job_id)
    assert (job.status, job.error) == ("failed", problem)


async def test_retries_end_after_as_many_attempts_as_allowed(queue):
    job_id = await submit(queue)
    verdicts = []
    for _ in range(queue.settings.max_attempts):
        verdicts.append(await queue.fail(await claim(queue), TRANSIENT, retry=True))
        await queue.redis.zadd(queue.key("delayed"), {job_id: 1}, xx=True)
    assert verdicts == ["retry", "retry", "dead"]
    assert (await queue.get(job_id)).error == TRANSIENT


async def test_a_job_given_back_keeps_its_place_and_its_attempts(queue):
    only_one = with_settings(queue, max_attempts=1)
    first = await submit(only_one)
    await submit(only_one)
    for attempt in (1, 2, 3):
        lease = await claim(only_one)
        assert (lease.job.id, lease.job.attempt) == (first, attempt)
        assert await only_one.release(lease) == "ok"
    assert await status(only_one, first) == "queued"


@pytest.mark.parametrize("close", ["finish", "fail", "release"])
async def test_closing_an_attempt_twice_is_closing_it_once(queue, close):
    job_id = await submit(queue)
    lease = await claim(queue)
    calls = {
        "finish": lambda: queue.finish(lease, [RESULT]),
        "fail": lambda: queue.fail(lease, TRANSIENT, retry=True),
        "release": lambda: queue.release(lease),
    }
    first, events = await calls[close](), len(await queue.events(job_id, 0))
    assert await calls[close]() == first
    assert len(await queue.events(job_id, 0)) == events


# Cancelling and expiring


async def test_cancelling_a_queued_job_takes_it_out(queue):
    job_id = await submit(queue)
    verdict, job = await queue.cancel(job_id)
    assert (verdict, job.status) == ("cancelled", "cancelled")
    assert (await queue.claim("w1", "", ["film"])).lease is None
    assert (await queue.cancel(job_id))[0] == "again"


async def test_cancelling_a_job_that_waits_for_its_retry_takes_it_out(queue):
    job_id = await submit(queue)
    await queue.fail(await claim(queue), TRANSIENT, retry=True)
    assert (await queue.cancel(job_id))[0] == "cancelled"
    await queue.redis.zadd(queue.key("delayed"), {job_id: 1}, xx=True)
    assert (await queue.claim("w1", "", ["film"])).lease is None


async def test_a_running_job_hears_that_it_was_cancelled(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    assert (await queue.cancel(job_id))[0] == "asked"
    assert await queue.cancel_asked(job_id)
    assert await queue.renew(lease) == "cancel"
    assert await queue.release(lease) == "cancelled"
    assert await status(queue, job_id) == "cancelled"


@pytest.mark.parametrize("end", ["finish", "fail", "lost"])
async def test_a_cancelled_job_ends_cancelled_whatever_its_worker_does(queue, end):
    job_id = await submit(queue)
    lease = await claim(queue)
    await queue.cancel(job_id)
    if end == "finish":
        assert await queue.finish(lease, [RESULT]) == "cancelled"
    elif end == "fail":
        assert await queue.fail(lease, TRANSIENT, retry=True) == "cancelled"
    else:
        await lose_lease(queue, lease)
        assert [s.what for s in await queue.sweep()] == ["cancelled"]
    job = await queue.get(job_id)
    assert (job.status, job.results) == ("cancelled", ())


async def test_cancelling_what_has_ended_or_never_was_says_so(queue):
    job_id = await submit(queue)
    await queue.finish(await claim(queue), [RESULT])
    assert (await queue.cancel(job_id))[0] == "ended"
    assert await queue.cancel(new_id()) == ("missing", None)


async def test_cancel_and_finish_at_once_agree_on_one_end(queue):
    for _ in range(20):
        job_id = await submit(queue)
        lease = await claim(queue)
        finished, (verdict, _) = await asyncio.gather(queue.finish(lease, [RESULT]), queue.cancel(job_id))
        ends = {("ok", "ended"): "succeeded", ("cancelled", "asked"): "cancelled"}
        assert await status(queue, job_id) == ends[finished, verdict]


async def test_a_job_that_waited_too_long_expires(queue):
    short = with_settings(queue, queue_ttl_seconds=0.05)
    job_id = await submit(short)
    await asyncio.sleep(0.1)
    assert [s.what for s in await short.sweep()] == ["expired"]
    assert await status(short, job_id) == "expired"
    assert (await short.claim("w1", "", ["film"])).lease is None


async def test_ended_jobs_are_kept_for_a_while_and_then_forgotten_with_their_files(queue):
    brief = with_settings(queue, job_ttl_seconds=1)
    job_id, alive = await submit(brief), await submit(brief)
    await brief.finish(await claim(brief), [RESULT])
    assert await brief.removals() == []
    await asyncio.sleep(1.1)
    assert await brief.get(job_id) is None
    assert await brief.removals() == [job_id]
    assert await brief.removals() == []  # named again only after a while
    await brief.forget(job_id)
    await brief.forget(alive)  # refused: it has not ended
    assert [j.id for j in (await brief.page("", 10))[0]] == [alive]


async def test_files_reserved_for_a_job_that_never_came_to_be_are_removed(queue, monkeypatch):
    monkeypatch.setattr(client, "UPLOAD_SECONDS", 0.05)
    orphan, born = new_id(), new_id()
    await queue.reserve(orphan)
    await queue.reserve(born)
    await queue.enqueue(born, "video", video_task())
    await asyncio.sleep(0.1)
    assert await queue.removals() == [orphan]


# Reading


async def test_events_are_numbered_and_replayed_from_any_number(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    for step in (1, 2):
        await queue.renew(lease, Progress(step=step, of=2))
        await queue.renew(lease, Progress(step=step, of=2))  # a beat without progress is no event
    await queue.finish(lease, [RESULT])
    events = await queue.events(job_id, 0)
    assert [(e.number, e.name) for e in events] == [
        (1, "status"),
        (2, "status"),
        (3, "progress"),
        (4, "progress"),
        (5, "done"),
    ]
    assert [e.data for e in events[1:4]] == [
        {"status": "running", "attempt": 1},
        {"step": 1, "of": 2, "attempt": 1},
        {"step": 2, "of": 2, "attempt": 1},
    ]
    assert [e.number for e in await queue.events(job_id, 3)] == [4, 5]


async def test_the_event_stream_of_a_job_is_capped(queue, monkeypatch):
    monkeypatch.setattr(client, "EVENTS_KEPT", 5)
    job_id = await submit(queue)
    lease = await claim(queue)
    for step in range(1, 21):
        await queue.renew(lease, Progress(step=step, of=20))
    assert [e.number for e in await queue.events(job_id, 0)] == [18, 19, 20, 21, 22]


async def test_pages_list_every_job_once_newest_first(queue):
    ids = [await submit(queue) for _ in range(5)]
    seen, cursor = [], ""
    while True:
        page, cursor = await queue.page(cursor, 2)
        seen += [job.id for job in page]
        if not cursor:
            break
        await submit(queue)  # what comes later is not part of the pages that follow
    assert seen == ids[::-1]


async def test_stats_tell_depth_age_and_pace(queue):
    await submit(queue)
    lease = await claim(queue)
    await asyncio.sleep(0.01)
    await queue.finish(lease, [RESULT])
    await submit(queue)
    await submit(queue)
    await claim(queue)
    await queue.beat("w1", [film()])
    stats = await queue.stats()
    assert (stats.waiting, stats.running, stats.workers) == (1, 1, 1)
    assert [(lane.artifact, lane.ready) for lane in stats.lanes] == [("film", 1)]
    assert stats.lanes[0].job_seconds > 0


async def test_a_published_description_holds_what_an_older_process_knows(queue):
    known = {"name", "kind", "family", "method", "bits", "density", "bytes", "limits", "quality", "kernels"}
    its = SelfTest(verdict="passed", device="cpu", seconds=1)
    await queue.beat("w1", [film().model_copy(update={"workers": 3, "tested": {"w1": its}})], {"film": its})
    published = json.loads(await queue.redis.hget(queue.key("artifacts"), "film"))
    assert published.keys() <= known
    (read,) = await queue.artifacts()
    assert read == film().model_copy(update={"workers": 1, "tested": {"w1": its}})


async def test_what_a_newer_worker_says_beside_is_ignored_and_what_cannot_be_read_is_left_out_and_logged_once(queue):
    await queue.beat("w1", [film(), room()], {"film": SelfTest(verdict="passed", device="cpu", seconds=1)})
    newer = film().model_dump() | {"colour": "red"}
    newer["limits"]["depth"] = 3
    await queue.redis.hset(queue.key("artifacts"), "film", json.dumps(newer))
    await queue.redis.hset(queue.key("artifacts"), "room", json.dumps(room().model_dump() | {"kind": "smell"}))
    await queue.redis.hset(queue.key("tested"), "w1", json.dumps({"film": {"verdict": "perhaps"}}))
    with capture_logs() as logs:
        for _ in range(2):
            (read,) = await queue.artifacts()
            assert read == film().model_copy(update={"workers": 1})
    assert sorted(line["of"] for line in logs if line["event"] == "published_unreadable") == ["room", "w1"]


async def test_the_tests_of_workers_that_older_code_forgot_are_forgotten(queue):
    await queue.redis.hset(queue.key("tested"), "gone", "{}")  # the older code removed it everywhere else
    await queue.beat("w1", [film()])
    assert await queue.redis.hkeys(queue.key("tested")) == ["w1"]


async def test_artifacts_outlive_their_workers(queue):
    brief = with_settings(queue, beat_seconds=0.4)  # a worker that is not heard of for three beats is gone
    await brief.beat("w1", [film(), room()])
    await queue.beat("w2", [film()])
    assert [(a.name, a.workers) for a in await queue.artifacts()] == [("film", 2), ("room", 1)]
    await asyncio.sleep(1.4)
    assert [(a.name, a.workers) for a in await queue.artifacts()] == [("film", 1), ("room", 0)]
    await queue.leave("w2")
    assert [(a.name, a.workers) for a in await queue.artifacts()] == [("film", 0), ("room", 0)]


# The server


async def test_two_versions_of_the_library_serve_side_by_side(queue, monkeypatch):
    job_id = await submit(queue)
    monkeypatch.setattr(client, "LIBRARY", "lowbit_v1_newer")
    monkeypatch.setattr(client, "_CODE", client._SOURCE.replace("@LIBRARY@", "lowbit_v1_newer"))
    assert (await claim(queue)).job.id == job_id
    monkeypatch.undo()
    assert (await queue.get(job_id)).status == "running"


async def test_a_flushed_function_library_is_loaded_again(queue):
    await submit(queue)
    await queue.redis.function_flush()
    assert (await queue.stats()).waiting == 1


async def test_a_server_that_is_away_is_reported_at_once(settings, tmp_path):
    async with Queue.open(f"unix://{tmp_path}/nobody.sock", settings) as away:
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            await away.stats()
        assert time.monotonic() - started < 10.0  # not the twenty of a client that is patient


async def test_a_server_that_may_not_write_is_reported_as_unavailable(queue):
    job_id = await submit(queue)
    lease = await claim(queue)
    await queue.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(UnavailableError):
            await submit(queue)
        assert (await queue.get(job_id)).status == "running"
        assert await queue.finish(lease, [RESULT]) == "ok"  # ending work is let through
    finally:
        await queue.redis.config_set("maxmemory", 0)
    assert await until(lambda: submit(queue))
