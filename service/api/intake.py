"""Files that come with a request: looked at, stored for the job, and removed again where it never comes to be."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from service.api.deps import Service
from service.api.uploads import SUFFIX
from service.jobs import Kind, Task, Upload
from service.queue.client import Idempotency, Submission
from service.results import digest, upload_path


@dataclass(frozen=True)
class Incoming:
    """A file that passed its looks, not yet stored."""

    content: IO[bytes]
    name: str
    type: str
    sha256: str


async def look(content: IO[bytes], stem: str, kind_of: Callable[[IO[bytes]], str]) -> Incoming:
    """`kind_of` gives its media type or raises RefusedError. The caller holds `service.looking`."""
    kind = await asyncio.to_thread(kind_of, content)
    sha256 = (await asyncio.to_thread(digest, content)).sha256
    return Incoming(content, f"{stem}.{SUFFIX[kind]}", kind, sha256)


async def enqueue(
    kind: Kind,
    files: Sequence[Incoming],
    task_of: Callable[[tuple[Upload, ...]], Task],
    idempotency: Idempotency | None,
    service: Service,
) -> Submission:
    """Stores the files under a new job and queues it; `task_of` makes its task of where they lie."""
    job_id = uuid.uuid4().hex
    if files:
        await service.queue.reserve(job_id)  # should this end here, they are removed all the same
    uploads = [await _store(file, job_id, service) for file in files]
    submission = await service.queue.enqueue(job_id, kind, task_of(tuple(uploads)), idempotency)
    if files and submission.job.id != job_id:  # another with the same key was faster
        await service.results.remove(f"uploads/{job_id}")
    return submission


async def _store(file: Incoming, job_id: str, service: Service) -> Upload:
    path = upload_path(job_id, file.name)
    stored = await service.results.put(path, file.content)
    return Upload(path=path, type=file.type, bytes=stored.bytes, sha256=stored.sha256)
