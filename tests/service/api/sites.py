"""Servers that a fetcher may meet, on loopback: they answer as they are told, and count who comes."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

Say = Callable[[bytes], Awaitable[None]]
Answer = Callable[[str, Say], Awaitable[None]]  # the path that was asked for, and how to send bytes


@dataclass
class Site:
    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def site(
    answer: Answer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Site]:
    """Hears one request on each connection, answers it, and closes."""
    site = Site()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site.connections += 1

        async def say(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            request = await reader.readuntil(b"\r\n\r\n")
            site.requests.append(request)
            await answer(request.split(b" ")[1].decode(), say)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has seen enough
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    server = await asyncio.start_server(serve, host, port, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


def response(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def always(data: bytes) -> Answer:
    async def answer(path: str, say: Say) -> None:
        await say(data)

    return answer


def pages(**of: bytes) -> Answer:
    """By path without its slash; anything else is 404."""

    async def answer(path: str, say: Say) -> None:
        await say(of.get(path.strip("/"), response(b"", "404 Not Found")))

    return answer


_connected: list[object] | None = None


def _audit(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.connect" and _connected is not None:
        _connected.append(args[1])


sys.addaudithook(_audit)  # cannot be removed: it listens only inside `connects`


@contextmanager
def connects() -> Iterator[list[object]]:
    """The addresses that this process connects to meanwhile, as the interpreter itself reports them."""
    global _connected
    _connected = []
    try:
        yield _connected
    finally:
        _connected = None
