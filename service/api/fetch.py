"""An image at a stranger's URL: read from allowed hosts and public addresses alone, within bounds of time and size.

The rule is asked where the connection is made, about the address it is made to, so no name can lead elsewhere between
the two. httpcore is used and not httpx above it: it follows no redirect, keeps no cookie, decompresses nothing, reads
no proxy and no password from the environment. docs/decisions/0003-start-images.md has the reasons.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property
from ssl import SSLContext
from typing import IO

import httpcore
import httpx
import structlog

from service.api.addresses import may_connect, parse
from service.api.problems import RETRY_SECONDS, ProblemError
from service.api.uploads import RefusedError, spooled
from service.settings import Settings

FETCHES_AT_ONCE = 8
MOST_REDIRECTS = 3
MOST_ADDRESSES = 4  # of one host that are tried
CONNECT_SECONDS = 3.0  # to one address
QUOTED = 100  # characters of what the other side says
SPOOLED = 1024 * 1024  # bytes kept in memory, the rest on the disk
_PORTS = {"http": 80, "https": 443}
_MOVED = frozenset({301, 302, 303, 307, 308})
_HEADERS = [
    (b"Accept", b"image/jpeg, image/png, image/webp"),
    (b"Accept-Encoding", b"identity"),
    (b"User-Agent", b"lowbit"),
    (b"Connection", b"close"),
]

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]  # host and port to addresses; OSError where it has none

_log = structlog.get_logger()


class Fetcher:
    """At most FETCHES_AT_ONCE at a time. `lookup` stands in for this machine's resolver, in tests of names."""

    def __init__(self, settings: Settings, lookup: Lookup | None = None) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(FETCHES_AT_ONCE)
        # Threads of their own: a lookup cannot be cancelled, and slow ones must not hold up the rest of this process.
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, "lookup")
        self._backend = _Guarded(lookup or self._lookup, settings)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str) -> IO[bytes]:
        """What lies there, whatever it is, from its start. Raises RefusedError that says why there is nothing."""
        target = self._checked(_parsed(url))
        async with self._slot():
            file = spooled(SPOOLED)
            try:
                async with asyncio.timeout(self._settings.fetch_seconds):
                    await self._read(target, file)
            except BaseException as error:
                file.close()
                refusal = _explained(error, self._settings)
                if refusal is None:
                    raise
                _log.warning("image_not_fetched", host=_host(target), why=str(refusal))
                raise refusal from error
        file.seek(0)
        return file

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._settings.fetch_seconds):
                await self._slots.acquire()
        except TimeoutError as error:
            detail = f"{FETCHES_AT_ONCE} images are being fetched; try again, or send the image itself"
            raise ProblemError("too-many-fetches", detail, headers={"Retry-After": str(RETRY_SECONDS)}) from error
        try:
            yield
        finally:
            self._slots.release()

    def _checked(self, url: httpx.URL) -> httpx.URL:
        """The URL, where what it says of scheme, user, port and host is allowed. Its address is not known yet."""
        settings = self._settings
        if url.scheme not in _PORTS:
            raise RefusedError(f"cannot be fetched: the scheme is {url.scheme[:QUOTED]!a}; http and https are taken")
        if url.userinfo:
            raise RefusedError("cannot be fetched: a URL with a user name or password is not taken")
        port = _PORTS[url.scheme] if url.port is None else url.port
        if port not in settings.fetch_ports:
            ports = ", ".join(map(str, settings.fetch_ports))
            raise RefusedError(f"cannot be fetched: port {port} is not taken; {ports} would do")
        host = _host(url)
        if not settings.fetch_hosts:
            raise RefusedError("cannot be fetched: this service fetches no URL; send the image as a file or data URI")
        if not host or not any(_fits(host, pattern) for pattern in settings.fetch_hosts):
            hosts = ", ".join(settings.fetch_hosts)
            raise RefusedError(f"cannot be fetched: host {host!a} is not taken; {hosts} would do")
        return url

    async def _read(self, url: httpx.URL, file: IO[bytes]) -> None:
        """Writes the body to `file`, following redirects."""
        for _ in range(MOST_REDIRECTS + 1):
            # A pool of its own for each: no connection is ever used for a second request.
            pool = httpcore.AsyncConnectionPool(
                self._tls if url.scheme == "https" else None, network_backend=self._backend
            )
            target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            async with pool, pool.stream("GET", target, headers=[(b"Host", url.netloc), *_HEADERS]) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status not in _MOVED or b"location" not in headers:
                    _check_head(response.status, headers, url, self._settings)
                    await self._copy(response.aiter_stream(), file)
                    return
            url = self._checked(_parsed(headers[b"location"].decode("latin-1"), url))
        raise RefusedError(f"cannot be fetched: it is redirected more than {MOST_REDIRECTS} times")

    async def _copy(self, chunks: AsyncIterator[bytes], file: IO[bytes]) -> None:
        size, most = 0, self._settings.max_start_image_bytes
        async for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise RefusedError(f"cannot be fetched: it has more than {most} bytes")
            file.write(chunk)

    @cached_property
    def _tls(self) -> SSLContext:
        return httpx.create_ssl_context()  # of SSL_CERT_FILE or SSL_CERT_DIR, else of Mozilla's list

    async def _lookup(self, host: str, port: int) -> list[str]:
        ask = asyncio.get_running_loop().run_in_executor
        found = await ask(self._threads, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in found]


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to a host only where every one of its addresses is allowed, and to one of those."""

    def __init__(self, lookup: Lookup, settings: Settings) -> None:
        self._lookup = lookup
        self._settings = settings
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature; the whole fetch is timed
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        # A name that is not known and one that leads inside are told in the same words: what names a network has
        # inside is nobody's business.
        nowhere = RefusedError(f"cannot be fetched: {host!a} leads to no public address")
        try:
            found = [parse(text) for text in await self._lookup(host, port)]
        except (OSError, ValueError) as error:  # ValueError: what is no address, or no name that could be asked for
            raise nowhere from error
        addresses = list(dict.fromkeys(found))
        refused = [address for address in addresses if not may_connect(address, self._settings.fetch_networks)]
        if refused or not addresses:
            _log.warning("address_refused", host=host, addresses=[str(address) for address in refused])
            raise nowhere
        failure: Exception = nowhere
        for address in addresses[:MOST_ADDRESSES]:
            try:
                return await self._backend.connect_tcp(str(address), port, CONNECT_SECONDS)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise RefusedError("cannot be fetched: a socket of this machine is no public address")


def _parsed(text: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        return httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise RefusedError(f"cannot be fetched: not a URL: {error}") from error


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii").lower().removesuffix(".")


def _fits(host: str, pattern: str) -> bool:
    """`*` is any host, `*.example.org` any below that name, and anything else that host alone."""
    return pattern == "*" or (host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern)


def _check_head(status: int, headers: dict[bytes, bytes], url: httpx.URL, settings: Settings) -> None:
    if status != 200:
        raise RefusedError(f"cannot be fetched: {_host(url)} answered {status}")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise RefusedError(
            f"cannot be fetched: it came compressed ({encoding[:QUOTED].decode('latin-1')!a}), though not asked"
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > settings.max_start_image_bytes:
        raise RefusedError(f"cannot be fetched: it has {int(length)} bytes; at most {settings.max_start_image_bytes}")


def _explained(error: BaseException, settings: Settings) -> RefusedError | None:
    """None for what is no answer of the other side's."""
    match error:
        case RefusedError():
            return error
        case TimeoutError():
            return RefusedError(f"cannot be fetched: it did not come whole within {settings.fetch_seconds:g} s")
        case httpcore.ConnectTimeout() | httpcore.ConnectError():
            return RefusedError(f"cannot be fetched: no connection: {str(error) or 'no answer'}")
        case httpcore.NetworkError() | httpcore.ProtocolError() | httpcore.TimeoutException():
            return RefusedError(f"cannot be fetched: the answer broke off or is no HTTP: {error}")
    return None
