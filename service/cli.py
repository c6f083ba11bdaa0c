"""The command `lowbit`. A command imports what it needs when it runs: `lowbit --help` loads neither torch nor a server.

Serving, the offline stage, the demo, the benchmarks: each command reads its options, imports its module and calls it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service import child

if TYPE_CHECKING:
    from service.settings import Settings

app = typer.Typer(
    name="lowbit",
    help="Compressed video and 3D generators, made offline and served over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


dev = typer.Typer(help="For those who develop lowbit.", no_args_is_help=True)
app.add_typer(dev, name="dev")


def _option(text: str, variable: str, otherwise: str) -> Any:
    return typer.Option(help=f"{text} [{variable}; {otherwise}]", show_default=False)


Host = Annotated[str | None, _option("Address to answer at.", "LOWBIT_HOST", "127.0.0.1")]
Port = Annotated[int | None, _option("Port to answer at.", "LOWBIT_PORT", "8000")]
Data = Annotated[Path | None, _option("Folder of the private queue and of results.", "LOWBIT_DATA", ".lowbit")]
Artifacts = Annotated[
    list[Path] | None, _option("An artifact, or a folder of them; repeatable.", "LOWBIT_ARTIFACTS", "artifacts")
]
Device = Annotated[str | None, _option("auto, cpu or cuda.", "LOWBIT_DEVICE", "auto")]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Whether an artifact's hashes are checked as it is loaded. [LOWBIT_VERIFY; checked]",
        show_default=False,
    ),
]


# Serving


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    data: Data = None,
    artifacts: Artifacts = None,
    device: Device = None,
    verify: Verify = None,
) -> None:
    """API and one worker, with a private queue unless LOWBIT_REDIS_URL is set. A worker that dies is started again."""
    _needs_torch()
    settings = _settings(host=host, port=port, data=data, artifacts=artifacts, device=device, verify=verify)
    from service import artifacts as found
    from service.api.main import serve as serve_api
    from service.queue.embedded import server_url
    from service.settings import to_environment
    from service.supervise import Supervised
    from service.worker.loop import OBEY_SECONDS

    command = child.command("service.cli", "worker", "--with-parent")
    environment = child.environment() | to_environment(settings)
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
    verify: Verify = None,
    with_parent: Annotated[bool, typer.Option(hidden=True, help="Drain when standard input ends.")] = False,
) -> None:
    """One worker: one model loaded at a time, on one device. SIGTERM lets it end its job first."""
    _needs_torch()
    settings = _settings(data=data, artifacts=artifacts, device=device, verify=verify)
    from service.worker import machine
    from service.worker.main import work

    with _said_in_one_line():
        work(settings, partial(machine.load, check=settings.verify), machine.test, with_parent)


# The offline stage

Method = Annotated[str, typer.Option(help="none, rtn, smoothquant or quarot.")]
Bits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PATTERN=]FORMAT",
        show_default=False,
        help="Of weights, 2 to 8, and activations, 8, 6 or 4: w8a8 (default), w4a6, w3a6, w2a8; fp8, and w4afp8 for "
        "FP8 activations beside weights of 2 to 5 bits; w16a16 with none. "
        "Repeatable: 'ff.*=w8a8' is for layers whose dotted name, or what follows a dot in it, is so; later ones win, "
        "and one that matches nothing in the blocks asks for embedders or the head.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers that stay in 16 bits: 'blocks.0.*'; repeatable, wins over --bits."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:SCALE]", help="A LoRA's safetensors file or folder, merged before all else; repeatable."
    ),
]


@app.command()
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="FAMILY_OR_PATH", help="A checkpoint's folder, or demo-video or demo-scene.")
    ],
    out: Annotated[Path, typer.Option(help="The artifact's folder.")],
    method: Method = "rtn",
    bits: Bits = None,
    keep: Keep = None,
    lora: Loras = None,
    sparsity: Annotated[
        str,
        typer.Option(
            help="dense, or POLICY:density with further fields behind commas: topk:0.25,block=64, bands:0.25 or "
            "tiles:0.25; topp:0.9 has the share of a row's attention in the density's place."
        ),
    ] = "dense",
    table: Annotated[
        bool,
        typer.Option("--table", help="With bands: what heads would choose as they run is settled by the calibration."),
    ] = False,
    warmup: Annotated[float, typer.Option(help="Fraction of steps, from the first, with dense attention.")] = 0.0,
    qk_bits: Annotated[int, typer.Option(help="Of q and k in sparse attention: 8 or 16.")] = 8,
    dense_qk_bits: Annotated[int, typer.Option(help="Of q and k in dense attention: 8 or 16.")] = 16,
    pv_bits: Annotated[int, typer.Option(help="Of values, where q and k have 8: 16, or 8, which are FP8.")] = 16,
    refresh: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Cache what sparse attention loses, from one dense step over N sparse ones to the next.",
        ),
    ] = None,
    residual_order: Annotated[
        int | None, typer.Option(help="1: what the last refresh lost; 2: and its trend. [2]", show_default=False)
    ] = None,
    residual_rank: Annotated[
        int | None, typer.Option(help="Of the trend, at most the size of the heads. [16]", show_default=False)
    ] = None,
    residual_bits: Annotated[
        int | None, typer.Option(help="8: int8; 16: as values come. [8]", show_default=False)
    ] = None,
    residual_place: Annotated[
        str | None,
        typer.Option(help="device, host, or auto: host where the GPU has no room. [device]", show_default=False),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Runs to calibrate with.")] = 4,
    judging_samples: Annotated[int, typer.Option(min=0, help="Runs to measure quality with; 0 measures none.")] = 2,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A field of the method; repeatable.")
    ] = None,
    device: Device = None,
    replace: Annotated[bool, typer.Option(help="Put it in the place of the artifact that is there.")] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Layer by layer, for a checkpoint larger than memory: no quality is measured, and after a crash the "
            "same command goes on where it was. To calibrate, the checkpoint runs from the disk.",
        ),
    ] = False,
) -> None:
    """Make a checkpoint into an artifact: calibrate, convert, write, and measure how close it stays."""
    from rich.console import Console

    console = Console()
    with _told_in_one_line():
        from service import offline

        asked = {"order": residual_order, "rank": residual_rank, "bits": residual_bits, "place": residual_place}
        residual = offline.residual(refresh, **asked)
        plan = offline.plan(sparsity, warmup, qk_bits, dense_qk_bits, pv_bits, residual)
        given = (option or [], plan, calibration_samples, judging_samples, keep or [], lora or [], table)
        recipe = offline.recipe(method, bits or [], *given)
        device = device or os.environ.get("LOWBIT_DEVICE", "auto")
        make = offline.stream if stream else offline.quantize
        manifest = make(source, recipe, out, device, replace, console)
        console.print(offline.describe(out, manifest))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="An artifact.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest.")] = False,
) -> None:
    """What an artifact is made of. Every file's hash is checked."""
    from rich.console import Console

    with _told_in_one_line():
        from quant_runtime import artifact
        from service import offline

        manifest = artifact.read_manifest(folder)
        artifact.verify(folder, manifest)
        if as_json:
            typer.echo(manifest.model_dump_json(indent=1))
        else:
            Console().print(offline.describe(folder, manifest))


@app.command()
def selftest(
    folder: Annotated[Path, typer.Argument(help="An artifact.")],
    device: Device = None,
    data: Data = None,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Put the next version in the place of one that is wrong, and test it.")
    ] = False,
) -> None:
    """Which kernels an artifact runs by on this machine, and whether each is right. Ends with 1 where one is not."""
    _needs_torch()
    settings = _settings(data=data, device=device)
    from rich.console import Console

    from service.worker import machine

    machine.keep_kernels(settings)
    with _told_in_one_line():
        from models.selftest import check
        from quant_runtime.attention import describe_paths
        from service import selftest as shown

        device = machine.device_of(settings)
        report = check(folder, device, fallback)
        Console().print(shown.table(folder, report, describe_paths(device)))
    raise typer.Exit(1 if report.failures else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of what it makes.")] = Path("out/demo"),
    artifacts: Annotated[Path, typer.Option(help="Folder of the demo's artifacts.")] = Path("artifacts"),
    results: Annotated[Path | None, typer.Option(help="Also write the figures as rows into this file.")] = None,
) -> None:
    """Both demo models compressed, served, asked over HTTP, and held against themselves in full precision."""
    with _told_in_one_line():
        from service import demo as shown

        shown.run(out, artifacts, results)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="linear, attention: one op. video, scene: a whole demo model. "
            "quantize, load, whole, calibrate: checkpoints of full size in bounded memory."
        ),
    ],
) -> None:
    """Time an op or a demo model beside its baselines, or a large checkpoint's way; rows go into docs/results."""
    programs = {"linear": "quant_runtime.bench", "attention": "quant_runtime.bench"}
    programs |= {kind: f"models.demo.{kind}.bench" for kind in ("video", "scene")}
    programs |= dict.fromkeys(("quantize", "load", "calibrate"), "service.bench") | {"whole": "service.bench_whole"}
    if name not in programs:
        raise _refused(ValueError(f"no benchmark {name!r}: there are {', '.join(programs)}"))
    arguments = context.args if programs[name].startswith("models.demo") else [name, *context.args]
    done = subprocess.run(child.command(programs[name], *arguments), env=child.environment(), check=False)
    raise typer.Exit(done.returncode)


@dev.command()
def synth(
    name: Annotated[str, typer.Argument(help="A published checkpoint: hunyuan-video, wan-2.1-14b, cogvideox-5b ...")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint's folder.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; as published where it is left out.")
    ] = None,
) -> None:
    """Make a checkpoint of full size with random weights: its transformer alone, in shards as the hub has them."""
    from rich.console import Console

    with _told_in_one_line():
        from service import dev as made

        made.synth(name, folder, seed, dtype, Console())


def _needs_torch() -> None:
    """A worker without it would take jobs and fail them all."""
    if importlib.util.find_spec("torch") is None:
        raise _refused(ImportError("no torch here; a worker needs pip install 'lowbit-serve[worker]'"))


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
def _told_in_one_line() -> Iterator[None]:
    """An option or a folder that will not do is told without a traceback, and so is a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise _refused(ImportError(f"{error}; this needs pip install 'lowbit-serve[worker]'")) from error
    except (ValueError, OSError) as error:
        raise _refused(error) from error


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
    # OpenMP's threads spin while they wait. By default so long that two programs on the same cores slow each other down
    # tenfold and more; shorter costs nothing where cores are free. It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    app()


if __name__ == "__main__":
    main()
