"""One API process, from its settings to its end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from service.api.app import create_app
from service.queue.client import Queue
from service.results import Results
from service.settings import Settings

GRACE_SECONDS = 5  # for answers under way; a stream of events would never end by itself


def serve(settings: Settings, url: str) -> None:
    """Answers at settings.host and port, with the queue at `url`, until SIGTERM or SIGINT; a second ends it at once."""
    queue = Queue.open(url, settings)
    config = uvicorn.Config(
        create_app(settings, queue, Results(settings.results_location)),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # /metrics counts and times every request
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws="none",
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop, where it is installed
        runner.run(_serve(queue, _Server(config)))


async def _serve(queue: Queue, server: uvicorn.Server) -> None:
    async with queue:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
        await server.serve()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again once it has ended, and what there is left to close would not be
