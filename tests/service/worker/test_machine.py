"""A real artifact, a real queue, a worker whose kernel is wrong: nothing is lost, nothing wrong is answered."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from models import compress, registry
from models.compress import Recipe
from quant_runtime import compiles
from quant_runtime.compiles import Compile
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels._versions import OPS, Version
from quant_runtime.methods import Rtn
from service import metrics
from service.artifacts import find
from service.jobs import SceneTask, Upload
from service.worker import machine
from service.worker.loop import Worker
from service.worker.runner import Runner
from tests.service.support import new_id, picture, until
from tests.service.worker.test_loop import at_work, count, reaches

RECIPE = replace(Recipe(Rtn(), QuantFormat.parse("w4a8")), calibration_samples=1, judging_samples=0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    registry.family("vggt").tiny(folder / "checkpoint")
    told = {"base": "tiny", "device": "cpu", "on_progress": lambda *_: None}
    compress.compress(registry.family("vggt"), folder / "checkpoint", RECIPE, folder / "artifacts" / "room", **told)
    return folder / "artifacts"


@pytest.fixture
def broken(monkeypatch):
    """The int4 matmul of this CPU answers zeros."""
    op = OPS["linear_packed"]
    wrong = Version(lambda *args: torch.zeros_like(op.reference(*args)), "broken")
    monkeypatch.setitem(op._versions, "cpu", (wrong, *op._versions["cpu"]))
    yield op
    op.rise("cpu")


@pytest.fixture
def start(queue, results, scene):
    def start(selftest: str) -> Worker:
        settings = queue.settings.model_copy(update={"selftest": selftest})
        runner = Runner(find([scene]), partial(machine.load, check=True), machine.test, settings, results)
        return Worker(settings, queue, results, runner)

    return start


@pytest.fixture
async def job(queue, results, tmp_path):
    images = []
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(picture("PNG", (56, 40 + n)))
        stored = await results.put(f"uploads/x/{n}.png", tmp_path / f"{n}.png")
        one = Upload(path=f"uploads/x/{n}.png", type="image/png", bytes=stored.bytes, sha256=stored.sha256)
        images.append(one)
    task = SceneTask(artifact="room", max_views=2, formats=("ply",), images=tuple(images))
    return (await queue.enqueue(new_id(), "scene", task)).job.id


async def test_a_worker_whose_kernel_is_wrong_leaves_the_job_to_one_whose_is_right(
    start, queue, job, broken, monkeypatch
):
    async with at_work(worker := start("refuse")):
        (room,) = await until(lambda: queue.artifacts())
        assert (room.workers, room.tested[worker.name].verdict) == (0, "refused")
        assert room.tested[worker.name].failures == {"linear_packed": "broken is off by 1, where 1e-06 is allowed"}
        await until(lambda: count(metrics.worker_state, "refused"))
        assert (await queue.get(job)).status == "queued"
    monkeypatch.setitem(broken._versions, "cpu", broken.versions("cpu")[1:])  # another machine, where it is right
    async with at_work(start("refuse")):
        done = await reaches(queue, job)
    assert (done.status, done.attempt, "linear_packed" in done.kernels) == ("succeeded", 1, False)


async def test_with_fallback_it_is_run_by_another_version_and_everything_says_so(start, queue, results, job, broken):
    async def told():
        (room,) = await queue.artifacts()
        return room if "linear_packed" in room.kernels else None

    async with at_work(worker := start("fallback")):
        done = await reaches(queue, job)
        room = await until(told)  # from the next beat on
    assert (done.status, done.attempt) == ("succeeded", 1)
    own = str(broken.versions("cpu")[1])
    said = f"{own}, not broken: broken is off by 1, where 1e-06 is allowed"
    assert done.kernels["linear_packed"] == said
    record = b"".join([chunk async for chunk in results.read(f"jobs/{job}/1/run.json")])
    assert said in record.decode()
    assert room.kernels["linear_packed"] == said
    assert room.tested[worker.name].verdict == "fallback"
    assert room.tested[worker.name].versions["linear_packed"] == own
    assert count(metrics.kernel_version, "linear_packed", own) == 1


def test_what_triton_compiles_is_counted(monkeypatch):
    machine._watch_compiles.cache_clear()
    before = [count(metrics.kernels_compiled, cache) for cache in ("miss", "hit")]
    monkeypatch.setattr(compiles, "_told", [])
    machine._watch_compiles()
    machine._watch_compiles()
    spent = count(metrics.kernel_compile_seconds, "miss")
    for tell in compiles._told:
        tell(Compile("_quantize_rows", 1.5, cached=False))
        tell(Compile("_quantize_rows", 0.01, cached=True))
    assert [count(metrics.kernels_compiled, cache) for cache in ("miss", "hit")] == [n + 1 for n in before]
    assert count(metrics.kernel_compile_seconds, "miss") == spent + 1.5
    machine._watch_compiles.cache_clear()


@pytest.mark.parametrize(
    ("environment", "setting", "kept"),
    [(None, None, "data/kernels"), ("/mine", None, "/mine"), ("/mine", "cache", "cache"), (None, "cache", "cache")],
)
def test_compiled_kernels_are_kept_where_the_settings_say(environment, setting, kept, settings, tmp_path, monkeypatch):
    monkeypatch.delenv(machine.CACHE, raising=False)
    if environment:
        monkeypatch.setenv(machine.CACHE, environment)
    given = tmp_path / setting if setting else None
    machine.keep_kernels(settings.model_copy(update={"kernel_cache": given}))
    assert os.environ[machine.CACHE] == str(tmp_path / kept)
