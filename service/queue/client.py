"""The queue's async face: each promise of functions.lua as one method, on the server's clock, safe to repeat.

Keys, all under the prefix with its hash tag (`{lowbit}` by default), so that they share one cluster slot:

    job:ID         hash    one job, all its fields
    events:ID      stream  its numbered events, capped; also the channel that says there is a new one
    jobs           zset    every job, by sequence number          sequence   int   of the last one
    ready:ARTIFACT zset    waiting now, by priority and age (KEDA scales on its ZCARD)
    delayed        zset    waiting for a retry, by due time       waiting    zset  ready and delayed, by expiry
    wake:ARTIFACT  list    a token per new job, for BLPOP         lanes      set   artifacts that ever had a job
    leases         zset    running, by end of lease               holding    hash  worker -> its running job
    dead           zset    tried as often as allowed              removals   zset  jobs whose files are due to go
    idem:KEY       hash    an idempotency key's first job         pace:ARTIFACT    mean ms of its last jobs
    workers        zset    the living, by end of beat             abilities  hash  worker -> artifacts it can run
    artifacts      hash    name -> description                    seen       zset  the same, by last beat
    tested         hash    worker -> its self-test of each artifact
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

import structlog
from pydantic import TypeAdapter, ValidationError
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.jobs import (
    ArtifactInfo,
    Job,
    JobStatus,
    Kind,
    Problem,
    Progress,
    Result,
    SceneTask,
    SelfTest,
    Task,
    VideoTask,
)
from service.settings import Settings

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 2.0  # a caller of the API waits so long for a server that hangs, and no longer
EVENTS_KEPT = 512  # per job; more steps than that lose their oldest progress events
UPLOAD_SECONDS = 3600  # files stored for a job that never came to be are removed after so long
_GUESS_SECONDS = 10.0  # until a place is free, where no job has been measured yet

_SOURCE = Path(__file__).with_name("functions.lua").read_text(encoding="utf-8")
# The version of the data, and the hash of the code: in a rolling upgrade old and new code serve side by side.
LIBRARY = f"lowbit_v1_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}"
_CODE = _SOURCE.replace("@LIBRARY@", LIBRARY)

_AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    OSError,
)
_AWAY_PREFIXES = ("MISCONF", "NOREPLICAS", "BUSY", "UNKILLABLE")
_RESULTS = TypeAdapter(tuple[Result, ...])
_TESTED = TypeAdapter(dict[str, SelfTest])
_INFO = TypeAdapter(ArtifactInfo)
_NOT_PUBLISHED = {"workers", "tested"}  # known of the living workers themselves
_TASKS: dict[str, type[VideoTask] | type[SceneTask]] = {"video": VideoTask, "scene": SceneTask}

_log = structlog.get_logger()
T = TypeVar("T")

Renewal = Literal["ok", "cancel", "lost"]
Finish = Literal["ok", "cancelled", "lost"]
Cancellation = Literal["missing", "cancelled", "again", "asked", "ended"]
Failure = Literal["failed", "dead", "retry", "cancelled", "lost"]


class UnavailableError(Exception):
    """The server cannot be reached, or cannot write now. Whether the call took place is not known: repeat it."""


class ConflictError(Exception):
    """The idempotency key was first used for another request; `job` is what came of that one."""

    def __init__(self, job: str) -> None:
        super().__init__(f"this idempotency key belongs to job {job}, which was asked for otherwise")
        self.job = job


class FullError(Exception):
    """As many jobs wait as the queue takes; `seconds` until a place is free, by the pace of the last jobs."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; a place is free in about {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Idempotency:
    key: str
    fingerprint: str  # of the request as it was sent


@dataclass(frozen=True)
class Submission:
    job: Job
    created: bool  # False where this request had made the job before


@dataclass(frozen=True)
class Lease:
    """One attempt's right to a job."""

    job: Job
    worker: str
    waited: float  # seconds from its place in the queue to this claim

    @property
    def names(self) -> tuple[str, int, str]:
        return self.job.id, self.job.attempt, self.worker


@dataclass(frozen=True)
class Swept:
    """A job that time moved: requeued or dead after a lost lease, cancelled likewise, or expired."""

    what: Literal["requeued", "dead", "cancelled", "expired"]
    kind: Kind
    artifact: str


@dataclass(frozen=True)
class Claim:
    lease: Lease | None
    swept: tuple[Swept, ...]


@dataclass(frozen=True)
class Event:
    number: int
    name: str  # status, progress, done
    data: dict[str, Any]


@dataclass(frozen=True)
class Lane:
    artifact: str
    ready: int
    oldest_seconds: float
    job_seconds: float  # mean of the last jobs; 0 where none has ended


@dataclass(frozen=True)
class Stats:
    waiting: int
    delayed: int
    running: int
    dead: int
    workers: int
    lanes: tuple[Lane, ...]


class Queue:
    """Methods raise UnavailableError when the server is away; none of them waits longer than a few seconds for it."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.prefix = "{" + settings.queue_prefix + "}"
        self._unread: set[tuple[str, str]] = set()  # what could not be read, and was logged

    @classmethod
    def open(cls, url: str, settings: Settings) -> Self:
        """`url` as redis-py takes it: redis://, rediss://, unix://. Connects on the first call."""
        redis = Redis.from_url(
            url,
            protocol=2,  # replies differ in shape between 2 and 3
            decode_responses=True,
            socket_connect_timeout=CONNECT_SECONDS,
            # Calls are timed in _answer: redis-py times them by asyncio.wait_for, which in Python 3.11 can swallow the
            # cancellation of a task: a loop that is told to stop would go on for ever.
            socket_timeout=None,
            health_check_interval=15,
            # One more try, at once: a pooled connection may be older than the server. Longer patience is the caller's.
            retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
        )
        return cls(redis, settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.redis.aclose()

    def key(self, *parts: str) -> str:
        return ":".join((self.prefix, *parts))

    # Submitting

    async def enqueue(
        self,
        job_id: str,
        kind: Kind,
        task: Task,
        idempotency: Idempotency | None = None,
    ) -> Submission:
        """Create the job, or find it: the same id, or the same idempotency key and fingerprint, is the same job.

        Raises ConflictError and FullError.
        """
        s = self.settings
        reply = await self._call(
            "enqueue",
            job_id,
            kind,
            task.artifact,
            s.video_priority if kind == "video" else s.scene_priority,
            task.model_dump_json(),
            s.queue_bound,
            _ms(s.queue_ttl_seconds),
            _ms(s.job_ttl_seconds),
            EVENTS_KEPT,
            idempotency.key if idempotency else "",
            idempotency.fingerprint if idempotency else "",
            _ms(s.idempotency_ttl_seconds),
        )
        submission = _submission(reply)
        assert submission is not None  # enqueue never answers {'room'}
        return submission

    async def precheck(self, artifact: str, idempotency: Idempotency | None) -> Submission | None:
        """What enqueue would answer, before files are stored for it; None where it would create a job."""
        key, fingerprint = (idempotency.key, idempotency.fingerprint) if idempotency else ("", "")
        return _submission(await self._call("precheck", key, fingerprint, self.settings.queue_bound, artifact))

    async def reserve(self, job_id: str) -> None:
        """Files are about to be stored for `id`: if it never becomes a job they are removed after a while."""
        await self._call("reserve", job_id, _ms(UPLOAD_SECONDS))

    # Reading

    async def get(self, job_id: str) -> Job | None:
        view = await self._call("get", job_id)
        return _job(view) if view else None

    async def page(self, cursor: str, limit: int) -> tuple[list[Job], str]:
        """A page of jobs, newest first, and the cursor of the next one ('' after the last)."""
        following, *views = await self._call("list", cursor, limit)
        return [_job(view) for view in views], following

    async def events(self, job_id: str, after: int) -> list[Event]:
        entries = await self._answer(self.redis.xrange(self.key("events", job_id), min=f"({after}-0"))
        return [Event(int(n.split("-")[0]), f["event"], json.loads(f["data"])) for n, f in entries]

    async def rings(self) -> AsyncIterator[str]:
        """Ids of jobs that have a new event, as it happens; '' once listening has begun, for what was missed before."""
        channel = self.key("events", "")
        async with self.redis.pubsub() as pubsub:
            await self._answer(pubsub.psubscribe(channel + "*"))
            while True:
                message = await self._answer(pubsub.get_message(timeout=ANSWER_SECONDS / 2))
                if message is not None:
                    begun = message["type"] == "psubscribe"
                    yield "" if begun else str(message["channel"]).removeprefix(channel)

    async def stats(self) -> Stats:
        waiting, delayed, running, dead, workers, *flat = await self._call("stats")
        lanes = [
            Lane(name, ready, oldest / 1000, pace / 1000)
            for name, ready, oldest, pace in zip(*(flat[i::4] for i in range(4)), strict=True)
        ]
        return Stats(waiting, delayed, running, dead, workers, tuple(sorted(lanes, key=lambda lane: lane.artifact)))

    # Working

    async def claim(self, worker: str, hot: str, artifacts: Iterable[str]) -> Claim:
        """The next job for a worker that can run `artifacts` and has `hot` loaded ('' for none).

        Priority first, then the hot artifact, then age; a job that was passed over for `affinity_seconds` goes next.
        A worker that holds a job is given the same one again: the answer to its last claim must have been lost.
        """
        s = self.settings
        patience = _ms(s.affinity_seconds)
        reply = await self._call("claim", worker, _ms(s.lease_seconds), hot, patience, s.max_attempts, *artifacts)
        lease = Lease(_job(reply[2]), worker, reply[1] / 1000) if len(reply) > 1 else None
        return Claim(lease, _swept(reply[0]))

    async def wake(self, artifacts: Iterable[str], seconds: float) -> None:
        """Returns when a job for one of `artifacts` may be ready, or after `seconds`, fewer than ANSWER_SECONDS."""
        await self._answer(self.redis.blpop([self.key("wake", name) for name in artifacts], timeout=seconds))

    async def renew(self, lease: Lease, progress: Progress | None = None) -> Renewal:
        step, of = (progress.step, progress.of) if progress else (0, 0)
        return cast(Renewal, await self._call("renew", *lease.names, _ms(self.settings.lease_seconds), step, of))

    async def cancel_asked(self, job_id: str) -> bool:
        return bool(await self._answer(self.redis.hget(self.key("job", job_id), "cancel")) == "1")

    async def finish(self, lease: Lease, results: Sequence[Result], kernels: Mapping[str, str] | None = None) -> Finish:
        """Commit. Exactly one attempt of a job is ever answered 'ok', and none once a caller has cancelled it.

        `kernels` say what it ran by.
        """
        files = _RESULTS.dump_json(tuple(results)).decode()
        return cast(Finish, await self._call("finish", *lease.names, files, json.dumps(dict(kernels or {}))))

    async def fail(self, lease: Lease, problem: Problem, retry: bool) -> Failure:
        """With `retry` it comes back after a back-off that doubles, until it has been tried as often as allowed."""
        s = self.settings
        terms = int(retry), s.max_attempts, _ms(s.backoff_seconds), _ms(s.backoff_max_seconds)
        return cast(Failure, await self._call("fail", *lease.names, problem.model_dump_json(exclude_none=True), *terms))

    async def release(self, lease: Lease) -> Finish:
        """Give it back to its old place, with no mark against it; ends it where a caller has cancelled it."""
        return cast(Finish, await self._call("release", *lease.names))

    async def beat(
        self, worker: str, artifacts: Iterable[ArtifactInfo], tested: Mapping[str, SelfTest] | None = None
    ) -> None:
        """This worker lives, for another three beats, and can run these, but those that its self-test has refused.

        Of an artifact only what is not a default is published: a process of an older version refuses fields that it
        does not know, and a default is what was meant before there was the field.
        """
        s, tested = self.settings, dict(tested or {})
        infos = {one.name: one.model_dump_json(exclude=_NOT_PUBLISHED, exclude_defaults=True) for one in artifacts}
        pairs = [text for pair in infos.items() for text in pair]
        able = sorted(name for name in infos if name not in tested or tested[name].verdict != "refused")
        ttl, keep = _ms(3 * s.beat_seconds), _ms(s.job_ttl_seconds)
        found = _TESTED.dump_json(tested).decode()
        await self._call("beat", worker, ttl, json.dumps(able), keep, found, *pairs)

    async def leave(self, worker: str) -> None:
        await self._call("leave", worker)

    async def artifacts(self) -> list[ArtifactInfo]:
        """What workers have published, by name, with how many live and can run it, and what their self-tests found.

        Workers of a newer version may say more than is known here: that is left out. What cannot be read even so is
        left out whole, and logged once.
        """
        published, abilities, found = await self._call("artifacts")
        names = [name for text in abilities for name in json.loads(text)]
        tests = {worker: self._read(worker, text, _TESTED) or {} for worker, text in _pairs(found)}
        infos = []
        for info in (self._read(name, text, _INFO) for name, text in _pairs(published)):
            if info is not None:
                tested = {worker: test[info.name] for worker, test in tests.items() if info.name in test}
                infos.append(info.model_copy(update={"workers": names.count(info.name), "tested": tested}))
        return sorted(infos, key=lambda info: info.name)

    def _read(self, name: str, text: str, kind: TypeAdapter[T]) -> T | None:
        try:
            return kind.validate_json(text, extra="ignore")
        except ValidationError as error:
            if (name, text) not in self._unread:
                self._unread.add((name, text))
                _log.warning("published_unreadable", of=name, error=str(error))
            return None

    # Ending

    async def cancel(self, job_id: str) -> tuple[Cancellation, Job | None]:
        """'cancelled': it is. 'again': it was already. 'ended': too late.

        'asked': it runs, and will end cancelled whatever its worker does.
        """
        reply = await self._call("cancel", job_id)
        return reply[0], _job(reply[1]) if len(reply) > 1 else None

    async def sweep(self) -> tuple[Swept, ...]:
        """What time alone changes; every claim does it too, so this is for the hours without a worker."""
        return _swept(await self._call("sweep", self.settings.max_attempts))

    async def removals(self, limit: int = 100) -> Sequence[str]:
        """Jobs whose files are to be removed now. They are named again in ten minutes unless forgotten."""
        return cast("list[str]", await self._call("removals", _ms(600), limit))

    async def forget(self, job_id: str) -> None:
        await self._call("forget", job_id)

    async def _call(self, name: str, *args: str | int) -> Any:
        try:
            return await self._answer(self.redis.fcall(f"{LIBRARY}_{name}", 1, self.prefix, *args))
        except exceptions.ResponseError as error:
            if "Function not found" not in str(error):
                raise
        await self._load()
        return await self._answer(self.redis.fcall(f"{LIBRARY}_{name}", 1, self.prefix, *args))

    async def _load(self) -> None:
        try:
            await self._answer(self.redis.function_load(_CODE))
        except exceptions.ResponseError as error:
            if "already exists" in str(error):  # another client was faster
                return
            if "unknown command" in str(error):
                raise RuntimeError("the queue needs Redis 7 or Valkey 7.2: this server has no functions") from error
            raise

    @staticmethod
    async def _answer(call: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await call
        except _AWAY as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        except exceptions.ResponseError as error:
            if str(error).startswith(_AWAY_PREFIXES):
                raise UnavailableError(str(error)) from error
            raise


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _time(ms: str | None) -> datetime | None:
    return datetime.fromtimestamp(int(ms) / 1000, UTC) if ms else None


def _submission(reply: list[Any]) -> Submission | None:
    match reply[0]:
        case "room":
            return None
        case "conflict":
            raise ConflictError(reply[1])
        case "full":
            raise FullError(reply[1] / 1000 or _GUESS_SECONDS)
        case verdict:
            return Submission(_job(reply[1]), verdict == "new")


def _pairs(flat: list[str]) -> Iterable[tuple[str, str]]:
    return zip(flat[0::2], flat[1::2], strict=True)


def _swept(flat: list[Any]) -> tuple[Swept, ...]:
    return tuple(Swept(*triple) for triple in zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _job(view: list[Any]) -> Job:
    rank, flat = view
    h: dict[str, str] = dict(zip(flat[0::2], flat[1::2], strict=True))
    created = _time(h["created"])
    assert created is not None
    return Job(
        id=h["id"],
        kind=cast(Kind, h["kind"]),
        status=JobStatus(h["status"]),
        artifact=h["artifact"],
        request=_TASKS[h["kind"]].model_validate_json(h["task"]),
        created_at=created,
        started_at=_time(h.get("started")),
        finished_at=_time(h.get("finished")),
        attempt=int(h["attempt"]),
        progress=Progress(step=int(h["step"]), of=int(h["of"])) if "of" in h else None,
        kernels=json.loads(h["kernels"]) if "kernels" in h else {},
        position=rank if rank >= 0 else None,
        results=_RESULTS.validate_json(h["results"]) if "results" in h else (),
        error=Problem.model_validate_json(h["error"]) if "error" in h else None,
    )
