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
    asyncio.run(_serve(settings, url))


async def _serve(settings: Settings, url: str) -> None:
    async with Queue.open(url, settings) as queue:
        app = create_app(settings, queue, Results(settings.results_location))
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,  # /metrics counts and times every request
            timeout_graceful_shutdown=GRACE_SECONDS,
            ws="none",
        )
        server = _Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
        await server.serve()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again once it has ended, and what there is left to close would not be
