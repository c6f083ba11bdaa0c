"""One worker process, from its settings to its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import structlog
from prometheus_client import start_http_server

from service import artifacts, metrics
from service.artifacts import Found
from service.queue.client import Queue
from service.queue.embedded import server_url
from service.results import Results
from service.settings import Settings, StartError
from service.worker.loop import UnusableError, Worker
from service.worker.machine import keep_kernels
from service.worker.runner import Load, Runner, Test

EXIT_UNUSABLE = 70  # whoever supervises the worker starts a new one

_log = structlog.get_logger()


def work(settings: Settings, load: Load, test: Test, with_parent: bool = False) -> None:
    """Returns when the worker has drained: after SIGTERM or SIGINT, or, `with_parent`, once standard input ends.

    A second signal ends it at once. Raises StartError where there is no artifact to run or the metrics port is taken;
    ends the process with EXIT_UNUSABLE where it can run no other job.
    """
    found = artifacts.needed(settings.artifacts)
    keep_kernels(settings)
    try:
        server, serving = start_http_server(settings.metrics_port, settings.metrics_host, metrics.REGISTRY)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise StartError(
            f"metrics cannot be served at {where}: {error}; LOWBIT_METRICS_PORT=0 takes a free port"
        ) from error
    _log.info("metrics_served", url=f"http://{settings.metrics_host}:{server.server_port}/metrics")
    try:
        with server_url(settings) as url:
            asyncio.run(_work(settings, url, found, load, test, with_parent))
    except UnusableError as error:
        _log.error("worker_unusable", error=str(error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_UNUSABLE)  # a model that hangs would not let the interpreter end
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


async def _work(
    settings: Settings, url: str, found: tuple[Found, ...], load: Load, test: Test, with_parent: bool
) -> None:
    results = Results(settings.results_location)
    async with Queue.open(url, settings) as queue:
        worker = Worker(settings, queue, results, Runner(found, load, test, settings, results))
        loop = asyncio.get_running_loop()

        def drain() -> None:
            if worker.draining.is_set():
                os._exit(128 + signal.SIGTERM)
            worker.draining.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain)
        if with_parent:

            def parent_gone() -> None:  # it never writes: there is something to read when it has ended, however it did
                loop.remove_reader(sys.stdin.fileno())
                worker.draining.set()

            loop.add_reader(sys.stdin.fileno(), parent_gone)
        await worker.run()
