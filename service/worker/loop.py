"""Claim, run, store, finish; renew while it runs; retry, give back, or give up. One loop, one job at a time.

The lease is renewed by the same loop that sees the job's progress, and only while there is some: a model that hangs
stops renewing. The worker outlives the queue server: what it runs goes on, and is committed when the server is back, if
no other attempt has begun by then.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NoReturn, TypeVar

import structlog

from service import metrics
from service.jobs import Problem, Progress, Reason, Result, failure
from service.queue.client import Lease, Queue, Renewal, UnavailableError
from service.results import Results, StorageError
from service.settings import Settings
from service.worker.runner import Runner, StoppedError, Watch, explain, reason_of

IDLE_SECONDS = 1.0  # an idle worker looks for itself so often, should a wake-up be lost
LOOK_SECONDS = 0.5  # a running job looks so often whether it was cancelled
REPORT_SECONDS = 0.1  # steps faster than this share a report
AWAY_SECONDS = (0.1, 2.0)  # first and longest pause between two tries of a server that is away
OBEY_SECONDS = 5.0  # a draining worker waits so long for the model's next step, then leaves

_log = structlog.get_logger()
T = TypeVar("T")

Stop = Literal["cancelled", "lost", "draining"]
RENEWALS: dict[Renewal, Stop | None] = {"ok": None, "cancel": "cancelled", "lost": "lost"}


class UnusableError(Exception):
    """This process cannot run another job: its model hangs, or its device is lost. Only a new process can."""


@dataclass
class Worker:
    settings: Settings
    queue: Queue
    results: Results
    runner: Runner
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}")
    _told: float | None = None  # when it was told to drain, on the monotonic clock

    async def run(self) -> None:
        """Until `draining` is set and the running job has ended or was given back. Raises UnusableError."""
        metrics.in_state("starting")
        metrics.holds(self.runner.infos.values())
        await self._test()
        presence = asyncio.create_task(self._be_present())
        log = _log.bind(worker=self.name)
        log.info("worker_started", artifacts=sorted(self.runner.offered), device=self.settings.device)
        try:
            while not self.draining.is_set():
                metrics.in_state("ready" if self.runner.offered else "refused")
                lease = await self._next()
                if lease is not None:
                    metrics.in_state("busy")
                    await self._attend(lease)
        finally:
            metrics.in_state("draining")
            presence.cancel()
            with suppress(asyncio.CancelledError):
                await presence
            with suppress(UnavailableError):
                await self.queue.leave(self.name)
            log.info("worker_stopped")

    async def _test(self) -> None:
        """The self-test, before anybody hears of this worker; a worker that is told to go does not wait for its end.

        Raises UnusableError where that of one artifact has no end.
        """
        test, told = asyncio.create_task(self.runner.test()), asyncio.create_task(self.draining.wait())
        patience = self.settings.stall_seconds
        while not (test.done() or told.done()) and (left := self.runner.moved + patience - time.monotonic()) > 0:
            await asyncio.wait({test, told}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not test.done():
            test.cancel()
            if self.draining.is_set():
                return
            what = self.runner.testing or "artifacts"
            raise UnusableError(f"the self-test of {what} has not ended in {patience:g} s: the device hangs")
        await test
        metrics.tested(self.runner.tested)
        for name, found in self.runner.tested.items():
            log = _log.bind(worker=self.name, artifact=name, device=found.device)
            times = {"seconds": found.seconds, "compile_seconds": found.compile_seconds, "cache": found.cache}
            if found.verdict == "passed":
                log.info("selftest_passed", **times)
            elif found.verdict == "fallback":
                log.warning("selftest_fallback", failures=found.failures, versions=found.versions, **times)
            else:
                log.error("selftest_refused", failures=found.failures, **times)

    async def _be_present(self) -> None:
        """Publishes the artifacts and that this worker lives, again after every outage."""
        beaten = time.monotonic()
        metrics.worker_beat_age_seconds.set_function(lambda: time.monotonic() - beaten)
        while True:
            try:
                await self.queue.beat(self.name, self.runner.infos.values(), self.runner.tested)
                beaten = time.monotonic()
            except UnavailableError as error:
                metrics.queue_errors.inc()
                _log.warning("queue_unavailable", error=str(error))
            except Exception as error:  # a fault of ours must not make a living worker look dead unseen
                _log.error("beat_failed", exc_info=error)
            await asyncio.sleep(self.settings.beat_seconds)

    async def _next(self) -> Lease | None:
        """The next job; None where there may be one now, or the worker drains."""
        names = self.runner.offered
        if not names:  # it stays, to be seen and to say why
            await self.draining.wait()
            return None
        claim = await self._insist(lambda: self.queue.claim(self.name, self.runner.hot, names), patience=0)
        if claim is None:
            return None
        metrics.count_swept(claim.swept)
        if claim.lease is None:
            await self._idle(names)
        return claim.lease

    async def _idle(self, names: list[str]) -> None:
        """Until there may be a job, or the worker drains."""
        waits = {
            asyncio.create_task(self.queue.wake(names, IDLE_SECONDS)),
            asyncio.create_task(self.draining.wait()),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _attend(self, lease: Lease) -> None:
        job = lease.job
        log = _log.bind(job=job.id, attempt=job.attempt, artifact=job.artifact)
        log.info("job_started", waited=round(lease.waited, 3))
        metrics.job_queue_wait_seconds.labels(job.kind, job.artifact).observe(lease.waited)
        started = time.monotonic()
        watch = Watch(job.kind, job.artifact)
        run = asyncio.create_task(self.runner.run(job, watch))
        stop = await self._keep(lease, watch, run)
        try:
            results = await run
        except StoppedError:
            log.info("job_stopped", why=stop)
            await self._stopped(lease, stop)
        except Exception as error:
            problem = explain(error)
            log.warning("job_failed", type=problem.type, exc_info=error)
            await self._failed(lease, problem)
        else:
            await self._done(lease, results)
            metrics.job_seconds.labels(job.kind, job.artifact).observe(time.monotonic() - started)
            log.info("job_done", seconds=round(time.monotonic() - started, 3))

    async def _keep(self, lease: Lease, watch: Watch, run: asyncio.Task[list[Result]]) -> Stop | None:
        """Renews the lease and reports steps until the run ends; says why it was told to stop, if it was.

        Raises UnusableError, the job given back, where the model does not come to its next step.
        """
        log = _log.bind(job=lease.job.id)
        stop: Stop | None = None
        reported: Progress | None = None
        beat_due = look_due = stopped = quiet = time.monotonic()
        while not run.done():
            now = time.monotonic()
            if stop is None and self._drained_since(now) > self.settings.drain_seconds:
                stop = "draining"
            if stop is None and now >= quiet and (now >= beat_due or watch.progress is not reported):
                progress = watch.progress
                try:
                    stop = RENEWALS[await self.queue.renew(lease, progress)]
                    reported, beat_due = progress, now + self.settings.beat_seconds
                except UnavailableError as error:  # the run goes on: the lease may outlast this, or be had back
                    metrics.queue_errors.inc()
                    log.warning("lease_not_renewed", error=str(error))
                    quiet = now + AWAY_SECONDS[1]
                look_due = now + LOOK_SECONDS
            if stop is None and now >= look_due:
                look_due = now + LOOK_SECONDS
                with suppress(UnavailableError):
                    stop = "cancelled" if await self.queue.cancel_asked(lease.job.id) else None
            if stop is not None and not watch.stop:
                watch.stop, stopped = True, now
            hangs = now - watch.moved > self.settings.stall_seconds
            if hangs or (stop == "draining" and now - stopped > OBEY_SECONDS):
                run.cancel()
                await self._abandon(lease, stop)
            await asyncio.wait([run], timeout=REPORT_SECONDS)
        return stop

    async def _done(self, lease: Lease, results: list[Result]) -> None:
        kernels = self.runner.infos[lease.job.artifact].kernels
        verdict = await self._insist(lambda: self.queue.finish(lease, results, kernels))
        if verdict == "ok":
            self._count_end(lease, "succeeded")
        elif verdict is not None:
            await self._discard(lease)
        if verdict == "cancelled":
            self._count_end(lease, "cancelled")
        if verdict == "lost":
            metrics.worker_lease_lost.inc()
            metrics.duplicates_suppressed.inc()

    async def _stopped(self, lease: Lease, stop: Stop | None) -> None:
        if stop == "lost":
            metrics.worker_lease_lost.inc()
            return
        verdict = await self._insist(lambda: self.queue.release(lease))
        if verdict == "cancelled":
            self._count_end(lease, "cancelled")
        elif verdict == "ok":
            metrics.jobs_requeued.labels("drained").inc()

    async def _failed(self, lease: Lease, problem: Problem) -> None:
        reason = reason_of(problem)
        metrics.job_failures.labels(reason).inc()
        verdict = await self._insist(lambda: self.queue.fail(lease, problem, retry=reason.passing))
        if verdict == "retry":
            metrics.jobs_requeued.labels(reason).inc()
        elif verdict in ("failed", "dead"):
            self._count_end(lease, "failed")
        elif verdict == "cancelled":
            self._count_end(lease, "cancelled")
        await self._discard(lease)
        if reason is Reason.OUT_OF_MEMORY:
            await self.runner.unload()
        if reason is Reason.DEVICE_LOST:
            raise UnusableError(problem.detail)
        if reason is Reason.ARTIFACT:
            self.runner.withdraw(lease.job.artifact)
            metrics.holds(self.runner.infos.values())
            if not self.runner.offered:
                raise UnusableError(f"no artifact is left that this worker can load: {problem.detail}")

    async def _abandon(self, lease: Lease, stop: Stop | None) -> NoReturn:
        """The model's thread does not come back: hand the job on, and give up this process."""
        if stop in ("draining", "cancelled"):
            await self._stopped(lease, stop)
        elif stop is None:
            silent = f"no step for {self.settings.stall_seconds:g} s"
            await self._failed(lease, failure(Reason.STALLED, f"{silent} on {self.name}"))
        raise UnusableError(f"the model does not come to its next step; job {lease.job.id} was given up")

    async def _discard(self, lease: Lease) -> None:
        """The files of an attempt that nobody will ask for; what cannot be removed now goes with the job."""
        with suppress(StorageError):
            await self.results.remove(f"jobs/{lease.job.id}/{lease.job.attempt}")

    async def _insist(self, call: Callable[[], Awaitable[T]], patience: float | None = None) -> T | None:
        """Until the queue server answers. None where the worker drains, and has for longer than its patience."""
        patience = self.settings.drain_seconds if patience is None else patience
        pause, longest = AWAY_SECONDS
        while True:
            try:
                return await call()
            except UnavailableError as error:
                metrics.queue_errors.inc()
                _log.warning("queue_unavailable", error=str(error))
            if self._drained_since(time.monotonic()) > patience:
                return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _drained_since(self, now: float) -> float:
        """Seconds since the worker was told to drain; negative while it was not."""
        if not self.draining.is_set():
            return -1.0
        if self._told is None:
            self._told = now
        return now - self._told

    def _count_end(self, lease: Lease, outcome: str) -> None:
        metrics.jobs_finished.labels(lease.job.kind, lease.job.artifact, outcome).inc()
