"""No URL leads to a forbidden address, and whatever a server does, a fetch ends: within its time, within its bytes."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from service.api.fetch import FETCHES_AT_ONCE, MOST_REDIRECTS, Fetcher, Lookup
from service.api.problems import ProblemError
from service.api.uploads import RefusedError
from service.settings import Settings
from tests.service.api.sites import Say, always, connects, pages, response, site
from tests.service.support import picture

PNG = picture()
MOST_BYTES = 65_536
PATIENCE = 10.0  # of a fetch that ends by itself, however busy this machine is
SECONDS = 1.0  # of one that only its time ends
ALLOWED = "127.0.0.2"  # stands for a public address: a loopback address that the settings of these tests name


def fetcher(*ports: int, lookup: Lookup | None = None, **change: Any) -> Fetcher:
    fields = {"fetch_hosts": ("*",), "fetch_ports": ports or (80, 443), "fetch_networks": f"{ALLOWED}/32"}
    fields |= {"fetch_seconds": PATIENCE, "max_start_image_bytes": MOST_BYTES}
    return Fetcher(Settings(**(fields | change)), lookup)


def resolver(**addresses: Sequence[str]) -> Lookup:
    """Names with _ for each dot; anything else has no address."""

    async def lookup(host: str, port: int) -> Sequence[str]:
        if host.replace(".", "_") not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return addresses[host.replace(".", "_")]

    return lookup


async def read(fetcher: Fetcher, url: str) -> bytes:
    try:
        with await fetcher.fetch(url) as file:
            return file.read()
    finally:
        fetcher.close()


async def refusal(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(RefusedError) as error:
        await read(fetcher, url)
    assert len(str(error.value)) < 300
    return str(error.value)


async def test_what_lies_there_comes_whole():
    async with site(pages(**{"a.png?size=1": response(PNG)}), ALLOWED) as there:
        assert await read(fetcher(there.port), f"http://{ALLOWED}:{there.port}/a.png?size=1#part") == PNG
    assert there.connections == 1


async def test_only_what_is_needed_is_told(monkeypatch, tmp_path):
    """No cookie, no password of a netrc file, nothing that a redirect could carry along."""
    (tmp_path / "netrc").write_text(f"machine {ALLOWED} login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    moved = response(b"", "302 Found", Location="/b", Set_Cookie="a=b")
    async with site(pages(a=moved, b=response(PNG)), ALLOWED) as there:
        await read(fetcher(there.port), f"http://{ALLOWED}:{there.port}/a")
    for path, request in zip(("/a", "/b"), there.requests, strict=True):
        assert request.decode().split("\r\n") == [
            f"GET {path} HTTP/1.1", f"Host: {ALLOWED}:{there.port}", "Accept: image/jpeg, image/png, image/webp",
            "Accept-Encoding: identity", "User-Agent: lowbit", "Connection: close", "", "",
        ]  # fmt: skip


async def test_proxies_of_the_environment_are_passed_by(monkeypatch):
    async with site(always(response(b"proxied"))) as proxy, site(always(response(PNG)), ALLOWED) as there:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await read(fetcher(there.port), f"http://{ALLOWED}:{there.port}/") == PNG
    assert proxy.connections == 0


# Where a URL may lead

LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0x7f.1", "017700000001", "0177.0.0.1",
    "127.0.0.1.", "LOCALHOST", "localhost", "0.0.0.0", "0", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]", "[2001:0:7f00:1::]", "127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "１２７.0.0.1", "①②⑦.0.0.1",
    "%31%32%37.0.0.1", "127.0.0.1%00.example.org", "[::1%25lo]", "[::1%lo]", "[fe80::1%25lo]",
]  # fmt: skip
ELSEWHERE = [
    "169.254.169.254", "0xa9fea9fe", "2852039166", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]",
    "[fd00:ec2::254]", "100.100.100.200", "168.63.129.16", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1",
    "198.18.0.1", "192.0.0.192", "224.0.0.1", "255.255.255.255", "[fe80::1]", "[fc00::1]", "[ff02::1]", "[2001:db8::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK + ELSEWHERE)
async def test_no_spelling_of_an_inner_address_is_connected_to(host):
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(site(always(response(PNG))))
        with suppress(OSError):  # a machine without IPv6
            await stack.enter_async_context(site(always(response(PNG)), "::1", there.port))
        with connects() as connected:
            told = await refusal(fetcher(there.port), f"http://{host}:{there.port}/a.png")
        assert connected == []
        assert there.connections == 0
    assert told.startswith("cannot be fetched: ")


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%eth0"],
        [ALLOWED, "127.0.0.1"],
        ["127.0.0.1", ALLOWED],
        ["nonsense"],
        [],
    ],
    ids=" ".join,
)
async def test_a_name_that_leads_inside_is_told_like_one_that_is_unknown(addresses):
    lookup = resolver(localtest_me=addresses)
    async with site(always(response(PNG))) as inside, site(always(response(PNG)), ALLOWED, inside.port) as allowed:
        with connects() as connected:
            told = await refusal(fetcher(inside.port, lookup=lookup), f"http://localtest.me:{inside.port}/")
            unknown = await refusal(fetcher(inside.port, lookup=lookup), f"http://unknown.me:{inside.port}/")
    assert told == unknown.replace("unknown.me", "localtest.me")
    assert (connected, inside.connections, allowed.connections) == ([], 0, 0)


async def test_a_name_that_changes_its_mind_is_connected_to_where_it_was_checked():
    answers = [[ALLOWED], ["127.0.0.1"]]
    asked = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    moved = response(b"", "302 Found", Location="/again")
    async with AsyncExitStack() as stack:
        allowed = await stack.enter_async_context(site(pages(**{"": response(PNG), "moved": moved}), ALLOWED))
        inside = await stack.enter_async_context(site(always(response(b"secret")), port=allowed.port))
        url = f"http://rebind.test:{allowed.port}"
        with connects() as connected:
            assert await read(fetcher(allowed.port, lookup=rebinding), f"{url}/") == PNG
            assert (len(asked), connected) == (1, [(ALLOWED, allowed.port)])
            asked.clear()
            told = await refusal(fetcher(allowed.port, lookup=rebinding), f"{url}/moved")
            assert (len(asked), connected) == (2, [(ALLOWED, allowed.port)] * 2)
    assert "leads to no public address" in told
    assert inside.connections == 0


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "//127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://0.0.0.0:{port}/",
        "http://169.254.169.254:{port}/latest/meta-data/",
        "http://me@127.0.0.2:{port}/",
        "http://127.0.0.2:6379/",
        "https://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "ftp://127.0.0.2/a.png",
        "data:image/png;base64,AAAA",
        "unix:///run/redis.sock",
        "http://",
        "http://[",
        "\xff\xfe",
    ],
)
async def test_a_redirect_is_checked_like_a_url(location):
    async with site(always(b"")) as inside:
        moved = response(b"", "302 Found", Location=location.format(port=inside.port))
        async with site(pages(moved=moved), ALLOWED, inside.port):
            with connects() as connected:
                await refusal(fetcher(inside.port), f"http://{ALLOWED}:{inside.port}/moved")
    assert set(connected) == {(ALLOWED, inside.port)}
    assert inside.connections == 0


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_a_few_redirects_are_followed(status):
    def hop(number: int) -> bytes:
        return response(b"", status, Location=f"{number + 1}")

    hops = {str(number): hop(number) for number in range(MOST_REDIRECTS)}
    async with site(pages(**hops, **{str(MOST_REDIRECTS): response(PNG)}), ALLOWED) as there:
        assert await read(fetcher(there.port), f"http://{ALLOWED}:{there.port}/0") == PNG
    async with site(always(response(b"", status, Location="/again")), ALLOWED) as there:
        assert "redirected more than 3 times" in await refusal(fetcher(there.port), f"http://{ALLOWED}:{there.port}/0")
    assert there.connections == MOST_REDIRECTS + 1


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("file:///etc/passwd", "scheme is 'file'"),
        ("gopher://127.0.0.2:80/_x", "scheme is 'gopher'"),
        ("ftp://127.0.0.2/", "scheme is 'ftp'"),
        ("//127.0.0.2/", "scheme is ''"),
        ("a.png", "scheme is ''"),
        ("http+unix://%2Frun%2Fredis.sock/", "scheme"),
        ("http://me@127.0.0.2/", "user name or password"),
        ("http://me:secret@127.0.0.2/", "user name or password"),
        ("http://127.0.0.2@127.0.0.1/", "user name or password"),
        ("http://127.0.0.2:80@127.0.0.1/", "user name or password"),
        ("http://127.0.0.2:6379/", "port 6379 is not taken; 80, 443 would do"),
        ("http://127.0.0.2:0/", "port 0 is not taken"),
        ("http://127.0.0.2:80443/", "port 80443 is not taken"),
        ("http://127.0.0.2:8o/", "not a URL"),
        ("http:///a.png", "host '' is not taken"),
        ("http://[::1/", "not a URL"),
        ("http://a b/", "'a%20b' leads to no public address"),
        ("http://127.0.0.2/\r\nX: y", "not a URL"),
        ("http://127.0.0.2/\0", "not a URL"),
        ("http://" + "a" * 70_000, "not a URL"),
        ("http://" + "a" * 64 + ".test/", "cannot be fetched"),
        ("http://xn--a.test/", "cannot be fetched"),
        ("http://\ud800.test/", "cannot be fetched"),
    ],
)
async def test_a_url_of_another_kind_is_refused_before_anything_is_asked(url, hint):
    with connects() as connected:
        assert hint in await refusal(fetcher(lookup=resolver()), url)
    assert connected == []


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("http://images.example.org:{port}/", True),
        ("http://IMAGES.EXAMPLE.ORG:{port}/", True),
        ("http://images.example.org.:{port}/", True),
        ("http://a.cdn.test:{port}/", True),
        ("http://a.b.cdn.test:{port}/", True),
        ("http://cdn.test:{port}/", False),
        ("http://evilcdn.test:{port}/", False),
        ("http://example.org:{port}/", False),
        ("http://images.example.org.evil.test:{port}/", False),
        ("http://images.example.org%2eevil.test:{port}/", False),
        ("http://evil.test:{port}#images.example.org", False),
        ("http://evil.test:{port}?.cdn.test", False),
        ("http://127.0.0.2:{port}/", False),
    ],
)
async def test_where_hosts_are_named_others_are_refused(url, taken):
    async def anywhere(host: str, port: int) -> Sequence[str]:
        return [ALLOWED]

    async with site(always(response(PNG)), ALLOWED) as there:
        by_name = fetcher(there.port, lookup=anywhere, fetch_hosts="images.example.org, *.cdn.test")
        url = url.format(port=there.port)
        if taken:
            assert await read(by_name, url) == PNG
        else:
            assert "images.example.org, *.cdn.test would do" in await refusal(by_name, url)
    assert there.connections == taken


async def test_by_default_no_url_is_fetched():
    with connects() as connected:
        assert "fetches no URL" in await refusal(Fetcher(Settings()), "https://example.org/a.png")
    assert connected == []


# What a server may do


IN_TIME = "within 1 s"


async def slowly(path: str, say: Say) -> None:
    for byte in response(PNG):
        await say(bytes([byte]))
        await asyncio.sleep(0.05)


async def never(path: str, say: Say) -> None:
    await asyncio.sleep(60)


async def endless(path: str, say: Say) -> None:
    await say(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await say(b"\0" * 65_536)


async def endless_chunks(path: str, say: Say) -> None:
    await say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await say(b"1000\r\n" + b"\0" * 4096 + b"\r\n")


async def endless_head(path: str, say: Say) -> None:
    await say(b"HTTP/1.1 200 OK\r\n")
    while True:
        await say(b"X-Y: " + b"z" * 30_000 + b"\r\n")


async def endless_patience(path: str, say: Say) -> None:
    while True:
        await say(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (slowly, IN_TIME),
        (never, IN_TIME),
        (endless, "more than 65536 bytes"),
        (endless_chunks, "more than 65536 bytes"),
        (endless_head, "is no HTTP"),
        (endless_patience, IN_TIME),
        (always(response(b"\0" * (MOST_BYTES + 1))), "65537 bytes; at most 65536"),
        (always(response(b"", Content_Encoding="gzip") + gzip.compress(b"\0" * 10**8)), "compressed ('gzip')"),
        (always(response(PNG, Content_Encoding="br")), "compressed ('br')"),
        (always(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"), "broke off"),
        (always(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"), "is no HTTP"),
        (always(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), "is no HTTP"),
        (always(b"SSH-2.0-OpenSSH_9.6\r\n"), "is no HTTP"),
        (always(b"\x16\x03\x01\x02\x00"), "broke off or is no HTTP"),
        (always(b""), "broke off"),
        (always(response(b"", "404 Not Found")), "answered 404"),
        (always(response(b"", "500 Oops")), "answered 500"),
        (always(response(PNG, "206 Partial Content")), "answered 206"),
        (always(response(b"", "304 Not Modified")), "answered 304"),
        (always(response(b"", "302 Found")), "answered 302"),
        (always(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), "is no HTTP"),
    ],
    ids=[
        "slow loris", "silence", "endless body", "endless chunks", "endless head", "endless 100s", "long", "gzip bomb",
        "brotli", "short", "absurd length", "negative length", "ssh", "tls", "nothing", "404", "500", "206", "304",
        "302 to nowhere", "upgrade",
    ],
)  # fmt: skip
async def test_whatever_a_server_does_the_fetch_ends_and_is_explained(answer, hint):
    seconds = SECONDS if hint == IN_TIME else PATIENCE
    async with site(answer, ALLOWED) as there:
        started = time.monotonic()
        told = await refusal(fetcher(there.port, fetch_seconds=seconds), f"http://{ALLOWED}:{there.port}/a.png")
        assert time.monotonic() - started < PATIENCE
    assert hint in told


async def test_nobody_listening_is_told():
    with socket.create_server((ALLOWED, 0)) as closed:
        port = closed.getsockname()[1]
    assert "no connection" in await refusal(fetcher(port), f"http://{ALLOWED}:{port}/")


async def test_the_next_address_is_tried_where_one_does_not_answer():
    lookup = resolver(two_test=["127.0.0.3", ALLOWED])
    async with site(always(response(PNG)), ALLOWED) as there:
        two = fetcher(there.port, lookup=lookup, fetch_networks="127.0.0.2/31")
        assert await read(two, f"http://two.test:{there.port}/") == PNG


async def test_a_resolver_that_does_not_answer_is_given_up():
    async def asleep(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    assert IN_TIME in await refusal(fetcher(lookup=asleep, fetch_seconds=SECONDS), "http://slow.test/")


async def test_a_fetch_that_finds_no_place_is_told_to_come_again():
    async with site(never, ALLOWED) as silent, site(always(response(PNG)), ALLOWED) as there:
        busy = fetcher(silent.port, there.port, fetch_seconds=SECONDS)
        fetches = [busy.fetch(f"http://{ALLOWED}:{silent.port}/") for _ in range(4 * FETCHES_AT_ONCE)]
        ends = await asyncio.gather(*fetches, return_exceptions=True)
        turned_away = [end for end in ends if isinstance(end, ProblemError)]
        assert len(turned_away) >= 2 * FETCHES_AT_ONCE  # those that began, and those that then took their places
        assert {(end.problem.status, end.slug) for end in turned_away} == {(503, "too-many-fetches")}
        assert all(int(end.headers["Retry-After"]) > 0 for end in turned_away)
        assert silent.connections + len(turned_away) == len(ends)
        assert await read(busy, f"http://{ALLOWED}:{there.port}/") == PNG  # their places are free again


# Who a server is


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A certificate for pictures.test, which is its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    name = ["-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(folder / "key.pem")]
    command = ["openssl", "req", "-x509", "-days", "2", *key, *name, "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


async def test_a_pinned_address_must_still_prove_the_name(certificates, monkeypatch):
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    lookup = resolver(pictures_test=[ALLOWED], other_test=[ALLOWED])
    async with site(always(response(PNG)), ALLOWED, tls=tls) as there:
        untrusted = await refusal(fetcher(there.port, lookup=lookup), f"https://pictures.test:{there.port}/")
        assert "certificate verify failed" in untrusted
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "cert.pem"))
        assert await read(fetcher(there.port, lookup=lookup), f"https://pictures.test:{there.port}/") == PNG
        for host, resolve in (("other.test", lookup), (ALLOWED, None)):
            told = await refusal(fetcher(there.port, lookup=resolve), f"https://{host}:{there.port}/")
            assert "certificate verify failed" in told
    assert len(there.requests) == 1
