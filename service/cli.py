"""The command `lowbit`. A command imports what it needs when it runs: `lowbit --help` loads neither torch nor a server.

Serving is here. The offline stage (quantize, inspect), the demo and the benchmarks add their commands to `app` below,
each a function that reads its options, imports its module and calls it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.base import Generator
    from service.settings import Settings

app = typer.Typer(
    name="lowbit",
    help="Compressed video and 3D generators, made offline and served over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _option(text: str, variable: str, otherwise: str) -> Any:
    return typer.Option(help=f"{text} [{variable}; {otherwise}]", show_default=False)


Host = Annotated[str | None, _option("Address to answer at.", "LOWBIT_HOST", "127.0.0.1")]
Port = Annotated[int | None, _option("Port to answer at.", "LOWBIT_PORT", "8000")]
Data = Annotated[Path | None, _option("Folder of the private queue and of results.", "LOWBIT_DATA", ".lowbit")]
Artifacts = Annotated[
    list[Path] | None, _option("An artifact, or a folder of them; repeatable.", "LOWBIT_ARTIFACTS", "artifacts")
]
Device = Annotated[str | None, _option("auto, cpu or cuda.", "LOWBIT_DEVICE", "auto")]


# Serving


@app.command()
def serve(
    host: Host = None, port: Port = None, data: Data = None, artifacts: Artifacts = None, device: Device = None
) -> None:
    """API and one worker, with a private queue unless LOWBIT_REDIS_URL is set. A worker that dies is started again."""
    settings = _settings(host=host, port=port, data=data, artifacts=artifacts, device=device)
    from service import artifacts as found
    from service.api.main import serve as serve_api
    from service.queue.embedded import server_url
    from service.settings import to_environment
    from service.supervise import Supervised
    from service.worker.loop import OBEY_SECONDS

    # -P and PYTHONPATH: the child imports these packages, and not what lies in the folder that it is started in.
    command = [sys.executable, "-P", "-m", "service.cli", "worker", "--with-parent"]
    root = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | to_environment(settings) | {"PYTHONPATH": root}
    if "LOWBIT_METRICS_PORT" not in os.environ:
        environment["LOWBIT_METRICS_PORT"] = "0"  # a port that is taken must not keep this worker from starting
    patience = settings.drain_seconds + OBEY_SECONDS + 5
    with _said_in_one_line():
        found.needed(settings.artifacts)
        with server_url(settings) as url, Supervised(command, environment, patience):
            typer.echo(f"lowbit answers at http://{settings.host}:{settings.port} (docs at /docs)", err=True)
            serve_api(settings, url)


@app.command()
def api(host: Host = None, port: Port = None, data: Data = None, artifacts: Artifacts = None) -> None:
    """The HTTP API alone. Needs no torch."""
    settings = _settings(host=host, port=port, data=data, artifacts=artifacts)
    from service.api.main import serve as serve_api
    from service.queue.embedded import server_url

    with _said_in_one_line(), server_url(settings) as url:
        typer.echo(f"lowbit answers at http://{settings.host}:{settings.port} (docs at /docs)", err=True)
        serve_api(settings, url)


@app.command()
def worker(
    data: Data = None,
    artifacts: Artifacts = None,
    device: Device = None,
    with_parent: Annotated[bool, typer.Option(hidden=True, help="Drain when standard input ends.")] = False,
) -> None:
    """One worker: one model loaded at a time, on one device. SIGTERM lets it end its job first."""
    settings = _settings(data=data, artifacts=artifacts, device=device)
    from service.worker.main import work

    with _said_in_one_line():
        work(settings, _load, with_parent)


def _load(path: Path, device: str) -> Generator:
    generator: Generator = importlib.import_module("models.load").load(path, device)  # by name: it brings torch
    return generator


def _settings(**given: Any) -> Settings:
    from service import logs
    from service.settings import from_environment

    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = from_environment(os.environ, **given)
    except ValueError as error:
        raise _refused(error) from error
    logs.configure(settings.log_level)
    return settings


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """What keeps a process from starting is told without a traceback: it is the setting that is at fault."""
    from service.results import StorageError
    from service.settings import StartError

    try:
        yield
    except (StartError, StorageError) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> typer.Exit:
    typer.echo(f"lowbit: {error}", err=True)
    return typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
