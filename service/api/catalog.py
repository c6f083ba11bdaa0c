"""The artifacts this service can run: those in LOWBIT_ARTIFACTS, and those that workers have published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from service.api.problems import RETRY_SECONDS, ProblemError, invalid
from service.jobs import ArtifactInfo, FieldError, Kind
from service.queue.client import Queue, UnavailableError

FRESH_SECONDS = 1.0


class Catalog:
    """Asks the queue at most once a second, and goes on with what it last heard while the queue is away."""

    def __init__(self, local: Iterable[ArtifactInfo], queue: Queue) -> None:
        self._local = {info.name: info for info in local}
        self._queue = queue
        self._published: dict[str, ArtifactInfo] = {}
        self._asked = -FRESH_SECONDS
        self._away: UnavailableError | None = None
        self._asking = asyncio.Lock()

    async def all(self) -> tuple[ArtifactInfo, ...]:
        """The local ones in the order of LOWBIT_ARTIFACTS, then the others by name; told as workers tell it."""
        await self._refresh()
        others = sorted(self._published.keys() - self._local.keys())
        return tuple(self._published.get(name) or self._local[name] for name in (*self._local, *others))

    async def choose(
        self, kind: Kind, name: str | None, suits: Callable[[ArtifactInfo], bool] = lambda info: True
    ) -> ArtifactInfo:
        """The named artifact; where none is named, the first of its kind that a living worker can run, else the first.

        Where none is named, those that suit go before all others. Raises ProblemError for a name that is none of that
        kind, and where no artifact of that kind is known.
        """
        fitting = [info for info in await self.all() if info.kind == kind]
        if not fitting:
            if self._away:
                raise self._away
            raise ProblemError(
                "no-artifact",
                f"no {kind} artifact is known: no worker has published one, and none lies in LOWBIT_ARTIFACTS",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        if name is None:
            suiting = [info for info in fitting if suits(info)] or fitting
            return next((info for info in suiting if info.workers), suiting[0])
        for info in fitting:
            if info.name == name:
                return info
        known = ", ".join(info.name for info in fitting)
        raise invalid(
            [FieldError(field="artifact", message=f"no {kind} artifact is named {name!r}; known are {known}")]
        )

    async def _refresh(self) -> None:
        if time.monotonic() - self._asked < FRESH_SECONDS:
            return
        async with self._asking:
            if time.monotonic() - self._asked < FRESH_SECONDS:
                return
            try:
                self._published = {info.name: info for info in await self._queue.artifacts()}
                self._away = None
            except UnavailableError as error:
                self._away = error
            self._asked = time.monotonic()
