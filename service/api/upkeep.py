"""What has to happen even while nobody asks for anything: leases run out, jobs expire, old files go."""

from __future__ import annotations

import asyncio

import structlog

from service import metrics
from service.queue.client import Queue, UnavailableError
from service.results import Results, StorageError

SWEEP_SECONDS = 2.0
_log = structlog.get_logger()


async def keep_up(queue: Queue, results: Results) -> None:
    """For ever. Any number of API processes may do it at once: every change is one atomic step of the queue."""
    while True:
        try:
            metrics.count_swept(await queue.sweep())
            await remove_old(queue, results)
        except (UnavailableError, StorageError) as error:
            _log.warning("upkeep_waits", error=str(error))
        except Exception as error:  # a fault of ours must not end it unseen
            _log.error("upkeep_failed", exc_info=error)
        await asyncio.sleep(SWEEP_SECONDS)


async def remove_old(queue: Queue, results: Results) -> None:
    """Files first, then the job: if this stops between the two, it is done again."""
    for job_id in await queue.removals():
        await results.remove(f"jobs/{job_id}", f"uploads/{job_id}")
        await queue.forget(job_id)
