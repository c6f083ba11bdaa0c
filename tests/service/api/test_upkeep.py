from __future__ import annotations

import asyncio

import pytest

from service import metrics
from service.api import upkeep
from service.results import MissingError, result_path, upload_path
from tests.service.queue.test_client import RESULT, claim, lose_lease, submit, with_settings
from tests.service.support import until


def requeued() -> float:
    return metrics.jobs_requeued.labels("worker-lost")._value.get()


async def test_a_lost_worker_is_noticed_even_when_no_other_asks_for_work(client, queue, monkeypatch):
    monkeypatch.setattr(upkeep, "SWEEP_SECONDS", 0.05)
    job_id = await submit(queue)
    lease, before = await claim(queue), requeued()
    await lose_lease(queue, lease)

    async def counted() -> bool:
        return requeued() > before

    await until(counted)  # the server moves the job first: only its answer is counted here
    assert requeued() == before + 1
    assert (await queue.get(job_id)).status == "queued"


async def test_files_go_when_their_job_has_been_kept_long_enough(queue, results, tmp_path):
    brief = with_settings(queue, job_ttl_seconds=0.05)
    old, alive = await submit(brief), await submit(brief)
    (tmp_path / "x").write_bytes(b"x")
    paths = [result_path(old, 1, "v"), upload_path(old, "0"), upload_path(alive, "0")]
    for path in paths:
        await results.put(path, tmp_path / "x")
    await brief.finish(await claim(brief), [RESULT])
    await asyncio.sleep(0.1)
    await upkeep.remove_old(brief, results)
    for path in paths[:2]:
        with pytest.raises(MissingError):
            await results.read(path).__anext__()
    assert await results.read(paths[2]).__anext__() == b"x"
    assert [job.id for job in (await brief.page("", 10))[0]] == [alive]


async def test_upkeep_outlives_a_server_that_is_away(settings, results, tmp_path, monkeypatch):
    from service.queue.client import Queue

    monkeypatch.setattr(upkeep, "SWEEP_SECONDS", 0.01)
    async with Queue.open(f"unix://{tmp_path}/nobody.sock", settings) as away:
        task = asyncio.create_task(upkeep.keep_up(away, results))
        await asyncio.sleep(0.2)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
