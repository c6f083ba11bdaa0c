"""Worker processes: killed, told to drain, left alone by their parent; and a queue server killed under them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.queue.client import Queue
from service.queue.embedded import EmbeddedServer
from service.settings import Settings, StartError
from service.worker.main import work
from tests.service.support import until
from tests.service.worker import toy
from tests.service.worker.test_loop import answers, content, kept, moves, reaches, submit

LONG = 100  # steps: two seconds


class Process:
    """A worker process of the toy, on the same queue, store and artifacts as the test."""

    def __init__(self, url: str, settings: Settings, log: Path, **change: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LOWBIT_")}
        environment |= {
            "LOWBIT_REDIS_URL": url,
            "LOWBIT_QUEUE_PREFIX": settings.queue_prefix,
            "LOWBIT_RESULTS_URL": settings.results_location,
            "LOWBIT_ARTIFACTS": str(settings.artifacts[0]),
            "LOWBIT_DATA": str(settings.data),
            "LOWBIT_DEVICE": "cpu",
            "LOWBIT_METRICS_PORT": "0",
            "LOWBIT_LEASE_SECONDS": "1",
            "LOWBIT_BEAT_SECONDS": "0.25",
        } | change
        self.log = log
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tests.service.worker.toy"], env=environment, stdin=subprocess.PIPE, stderr=out
            )

    def end(self) -> int:
        self.popen.stdin.close()
        return self.popen.wait(15)


@pytest.fixture
def start(server: EmbeddedServer, settings: Settings, artifacts: Path, tmp_path: Path) -> Iterator:
    started: list[Process] = []

    def start(url: str = server.url, **change: str) -> Process:
        started.append(Process(url, settings, tmp_path / f"worker-{len(started)}.log", **change))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()
        process.popen.stdin.close()


async def test_a_killed_worker_s_job_is_run_again_and_committed_once(start, queue, results, settings):
    processes = [start(), start()]
    job_id = await submit(queue, "survive", steps=LONG)
    await moves(queue, job_id)
    holder = await queue.redis.hget(queue.key("job", job_id), "worker")
    (doomed,) = [p for p in processes if f"-{p.popen.pid}-" in holder]
    await until(lambda: _reported(queue, job_id, 2))
    doomed.popen.kill()
    job = await reaches(queue, job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert kept(settings) == [f"{job_id}/2/video.mp4"]
    assert await content(results, job, "video.mp4") == toy.film_of("survive", 7, LONG)
    events = await queue.events(job_id, 0)
    assert [e.data["attempt"] for e in events if e.name == "status"] == [0, 1, 1, 2]
    assert [e.name for e in events].count("done") == 1


async def _reported(queue: Queue, job_id: str, times: int) -> bool:
    return [event.name for event in await queue.events(job_id, 0)].count("progress") >= times


async def test_a_queue_server_killed_in_mid_job_costs_no_work(start, results, settings, tmp_path):
    with EmbeddedServer(tmp_path) as server:
        async with Queue.open(server.url, settings) as queue:
            start(server.url)
            job_id = await submit(queue, "survive", steps=LONG)
            await moves(queue, job_id)
            os.kill(int((await queue.redis.info("server"))["process_id"]), signal.SIGKILL)
            await until(lambda: answers(queue))
            job = await reaches(queue, job_id)
            assert (job.status, job.attempt) == ("succeeded", 1)
            assert await content(results, job, "video.mp4") == toy.film_of("survive", 7, LONG)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "its parent goes"])
async def test_a_worker_that_is_told_to_go_ends_its_job_first(start, queue, how):
    process = start()
    job_id = await submit(queue, steps=50)
    await moves(queue, job_id)
    if how == "its parent goes":
        process.popen.stdin.close()
    else:
        process.popen.send_signal(getattr(signal, how))
    assert await asyncio.to_thread(process.popen.wait, 15) == 0
    assert (await queue.get(job_id)).status == "succeeded"
    assert [a.workers for a in await queue.artifacts()] == [0, 0]


async def test_a_worker_whose_model_hangs_ends_with_a_code_of_its_own(start, queue):
    process = start(LOWBIT_STALL_SECONDS="0.5")
    job_id = await submit(queue, "hang")
    assert await asyncio.to_thread(process.popen.wait, 15) == 70
    assert (await queue.get(job_id)).status == "queued"
    assert "worker_unusable" in process.log.read_text()


async def test_a_worker_serves_its_metrics(start, queue):
    process = start()
    await reaches(queue, await submit(queue))
    await until(lambda: "metrics_served" in process.log.read_text())
    url = re.search(r"http://127\.0\.0\.1:\d+/metrics", process.log.read_text())[0]
    finished = 'lowbit_jobs_finished_total{artifact="film",kind="video",outcome="succeeded"} 1.0'

    async def counted() -> str:  # the queue knows first, and the worker counts what it was answered
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        return text if finished in text else ""

    text = await until(counted)
    assert 'lowbit_artifact_info{artifact="film"' in text
    assert 'lowbit_denoise_step_seconds_count{artifact="film"} 3.0' in text
    assert 'lowbit_stage_duration_seconds_count{artifact="film",stage="run"} 1.0' in text
    assert 'lowbit_artifact_selftest{artifact="film",verdict="passed"} 1.0' in text
    assert 'lowbit_kernel_version{op="toy",version="Python"} 1.0' in text
    assert process.end() == 0


def test_a_worker_without_an_artifact_says_where_it_looked(settings):
    with pytest.raises(StartError, match=rf"{settings.artifacts[0]}.*LOWBIT_ARTIFACTS"):
        work(settings, toy.load, toy.test)
