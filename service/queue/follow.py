"""Events of jobs as they come, for any number of callers over one subscription.

The event stream is the truth, the channel only a bell: a ring that is lost, or a server that is away, costs a caller at
most POLL_SECONDS, and never an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from service.queue.client import Event, Queue, UnavailableError

POLL_SECONDS = 5.0
RETRY_SECONDS = 0.5


class Followers:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._listener: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, after: int) -> AsyncIterator[Event]:
        """Events with a number above `after`, oldest first; ends after `done`, or when the job is gone."""
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen())
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        try:
            while True:
                bell.clear()
                try:
                    events = await self._queue.events(job_id, after)
                    job = await self._queue.get(job_id)
                except UnavailableError:
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                for event in events:
                    yield event
                    after = event.number
                if events and events[-1].name == "done":
                    return
                if not events and (job is None or job.status.ended):
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await bell.wait()
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener

    async def _listen(self) -> None:
        while True:
            with suppress(UnavailableError):
                async for job_id in self._queue.rings():
                    for bell in (
                        self._bells.get(job_id, ()) if job_id else [b for bs in self._bells.values() for b in bs]
                    ):
                        bell.set()
            await asyncio.sleep(RETRY_SECONDS)
