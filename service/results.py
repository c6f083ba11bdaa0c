"""Where files are kept: results under `jobs/<id>/<attempt>/<name>`, inputs under `uploads/<id>/<name>`.

One store behind a URL (file, s3, gs, az), shared by API and workers; a cloud's credentials come from its own
environment variables. A file appears whole or not at all. Attempts never share a folder, so a worker that lost its job
cannot touch what another has committed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

if TYPE_CHECKING:
    from obstore import GetOptions  # there for type checkers only

CHUNK = 1024 * 1024


class StorageError(Exception):
    """The store cannot be reached, or refused. Another try may fare better."""


class MissingError(Exception):
    """The store works, and holds no such file."""


@dataclass(frozen=True)
class Stored:
    bytes: int
    sha256: str


def result_path(job_id: str, attempt: int, name: str) -> str:
    return f"jobs/{job_id}/{attempt}/{name}"


def upload_path(job_id: str, name: str) -> str:
    return f"uploads/{job_id}/{name}"


class Results:
    """Raises StorageError where the store fails, MissingError where a file is not there."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._store = _open(url)
        except (BaseError, OSError, ValueError) as error:
            raise StorageError(f"the results cannot be kept at {url}: {_first_line(error)}") from error

    async def put(self, path: str, source: Path | IO[bytes]) -> Stored:
        """Stores the whole of `source`, from its start, and says what was stored."""
        stored = await asyncio.to_thread(digest, source)
        async with _translated(path):
            await obstore.put_async(self._store, path, source)
        return stored

    async def fetch(self, path: str, target: Path, sha256: str) -> None:
        """Copies a file to this machine; StorageError where what arrives is not what was stored."""
        with target.open("wb") as file:
            async for chunk in self.read(path):
                await asyncio.to_thread(file.write, chunk)
        if (await asyncio.to_thread(digest, target)).sha256 != sha256:
            raise StorageError(f"{path} is not what was stored: its SHA-256 is another")

    async def read(self, path: str, span: tuple[int, int] | None = None) -> AsyncIterator[bytes]:
        """All bytes, or those from span[0] up to and without span[1], in chunks."""
        async with _translated(path):
            options: GetOptions | None = {"range": span} if span else None
            got = await obstore.get_async(self._store, path, options=options)
            async for chunk in got.stream(CHUNK):
                yield chunk

    async def remove(self, *folders: str) -> None:
        """Removes every file under these folders; none there is no error."""
        for folder in folders:
            async with _translated(folder):
                async for batch in obstore.list(self._store, folder):
                    await obstore.delete_async(self._store, [item["path"] for item in batch])


def digest(source: Path | IO[bytes]) -> Stored:
    """Length and SHA-256 of the whole; an open file is left at its start."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return digest(file)
    source.seek(0)
    sha, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        sha.update(chunk)
        size += len(chunk)
    source.seek(0)
    return Stored(size, sha.hexdigest())


def _open(url: str) -> ObjectStore:
    if url.startswith("file://"):
        return LocalStore.from_url(url, mkdir=True, automatic_cleanup=True)
    return from_url(
        url,
        client_options={"connect_timeout": "3s", "timeout": "120s"},
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
    )


@asynccontextmanager
async def _translated(path: str) -> AsyncIterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{path} is not in the results store") from error
    except (BaseError, OSError) as error:
        raise StorageError(f"{path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
