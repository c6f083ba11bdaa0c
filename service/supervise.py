"""A child process that is started again whenever it ends, and never outlives this one."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import structlog

BACKOFF_SECONDS = (0.5, 30.0)  # first and longest pause before it is started again
HEALTHY_SECONDS = 60.0  # having lived so long, it begins with the first pause again

_log = structlog.get_logger()


class Supervised:
    """The child's standard input is a pipe from here: closing it tells the child to end, and so does our own death."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float) -> None:
        self._command = command
        self._environment = environment
        self._patience = patience  # seconds between telling it to end and killing it
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervise", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def pid(self) -> int | None:
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def _supervise(self) -> None:
        pause, longest = BACKOFF_SECONDS
        while not self._stop.is_set():
            started = time.monotonic()
            with subprocess.Popen(self._command, env=dict(self._environment), stdin=subprocess.PIPE) as child:
                self._child = child
                while child.poll() is None and not self._stop.wait(0.1):
                    pass
                if child.poll() is None:
                    self._end(child)
                    return
            lived = time.monotonic() - started
            if lived > HEALTHY_SECONDS:
                pause = BACKOFF_SECONDS[0]
            _log.warning("child_ended", code=child.returncode, lived=round(lived, 1), again_in=pause)
            self._stop.wait(pause)
            pause = min(2 * pause, longest)

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(self._patience)
        except subprocess.TimeoutExpired:
            _log.error("child_killed", pid=child.pid, patience=self._patience)
            child.kill()
            child.wait()
