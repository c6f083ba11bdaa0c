"""From a job to its files: inputs fetched and decoded, one thread for the models, names that can be trusted."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import threading
import time
from dataclasses import replace

import pytest
from PIL import Image

from models.base import NoRoom, OutputFile, Outputs
from service import metrics
from service.artifacts import find
from service.jobs import Upload
from service.worker import runner
from service.worker.runner import ArtifactError, ModelThread, Runner, Watch, explain, reason_of
from tests.service.queue.test_client import claim
from tests.service.support import new_id, picture, scene_task, video_task
from tests.service.worker import toy
from tests.service.worker.test_inputs import video


@pytest.fixture
def make(settings, results, artifacts):
    def make(load=toy.load, test=toy.test, **change):
        its = settings.model_copy(update=change)
        return Runner(find(settings.artifacts), load, test, its, results)

    return make


async def job_of(queue, kind, task):
    await queue.enqueue(new_id(), kind, task)
    return (await claim(queue)).job


async def upload(results, tmp_path, name: str, content: bytes, kind: str) -> Upload:
    (tmp_path / name).write_bytes(content)
    stored = await results.put(f"uploads/x/{name}", tmp_path / name)
    return Upload(path=f"uploads/x/{name}", type=kind, bytes=stored.bytes, sha256=stored.sha256)


async def sizes_seen(results, job) -> list[list[int]]:
    return json.loads(b"".join([c async for c in results.read(f"jobs/{job.id}/1/cameras.json")]))


async def test_images_reach_the_model_decoded_and_in_order(make, queue, results, tmp_path):
    images = [await upload(results, tmp_path, f"{w}.png", picture("PNG", (w, 30)), "image/png") for w in (40, 50)]
    job = await job_of(queue, "scene", scene_task().model_copy(update={"images": tuple(images)}))
    (result,) = await make().run(job, Watch("scene", "room"))
    assert (result.name, result.type) == ("cameras.json", "application/json")
    assert await sizes_seen(results, job) == [[40, 30], [50, 30]]


async def test_a_start_image_reaches_the_model_decoded(make, queue, results, tmp_path):
    image = await upload(results, tmp_path, "a.jpg", picture("JPEG", (40, 30)), "image/jpeg")
    job = await job_of(queue, "video", video_task(image=image))
    video, start = await make().run(job, Watch("video", "film"))
    assert (video.name, start.name) == ("video.mp4", "start.png")
    seen = Image.open(io.BytesIO(b"".join([c async for c in results.read(f"jobs/{job.id}/1/start.png")])))
    assert (seen.size, seen.mode, seen.format) == ((40, 30), "RGB", "PNG")


async def test_a_start_image_that_cannot_be_decoded_is_told_by_its_field(make, queue, results, tmp_path):
    torn = await upload(results, tmp_path, "a.png", picture("PNG", (80, 60))[:200], "image/png")
    with pytest.raises(Exception, match="the image cannot be decoded") as error:
        await make().run(await job_of(queue, "video", video_task(image=torn)), Watch("video", "film"))
    problem = explain(error.value)
    assert (reason_of(problem), problem.field) == ("bad-input", "image")


async def test_a_video_reaches_the_model_as_frames(make, queue, results, tmp_path):
    clip = await upload(results, tmp_path, "v.mp4", video(tmp_path / "v", 12).read_bytes(), "video/mp4")
    task = scene_task().model_copy(update={"images": (), "video": clip, "max_views": 3})
    job = await job_of(queue, "scene", task)
    await make().run(job, Watch("scene", "room"))
    assert await sizes_seen(results, job) == [[64, 64]] * 3


@pytest.mark.parametrize(("made_by", "kind", "field"), [("0" * 32, "bad-input", "job"), (None, "storage", None)])
async def test_a_source_that_is_gone_is_told(make, queue, made_by, kind, field):
    gone = Upload(path="jobs/x/1/video.mp4", type="video/mp4", bytes=1, sha256="0" * 64)
    task = scene_task().model_copy(update={"images": (), "video": gone, "job": made_by})
    with pytest.raises(Exception, match=r"video") as error:
        await make().run(await job_of(queue, "scene", task), Watch("scene", "room"))
    problem = explain(error.value)
    assert (reason_of(problem), problem.field) == (kind, field)


async def test_too_few_frames_are_told_before_the_model_runs(make, queue, results, tmp_path):
    clip = await upload(results, tmp_path, "v.mp4", video(tmp_path / "v", 1).read_bytes(), "video/mp4")
    task = scene_task().model_copy(update={"images": (), "video": clip})
    with pytest.raises(Exception, match="at least 2 are needed"):
        await make().run(await job_of(queue, "scene", task), Watch("scene", "room"))


@pytest.mark.parametrize("names", [(), ("a/b",), ("../x",), (".hidden",), ("a", "a")])
async def test_a_generator_s_file_names_are_not_trusted(make, queue, names, monkeypatch):
    def run(self, inputs, folder, on_step):
        (folder / "x").write_bytes(b"x")
        return Outputs(tuple(OutputFile(name, "video/mp4", folder / "x") for name in names))

    monkeypatch.setattr(toy.Toy, "run", run)
    with pytest.raises(ValueError, match="plain, different names"):
        await make().run(await job_of(queue, "video", video_task()), Watch("video", "film"))


async def test_a_model_of_another_kind_than_published_is_refused(make, queue):
    wrong = make(load=lambda path, device: toy.Toy("scene"))
    with pytest.raises(ArtifactError, match="published as video and loads as scene"):
        await wrong.run(await job_of(queue, "video", video_task()), Watch("video", "film"))


async def test_how_long_a_load_took_is_told(make, queue):
    def slowly(path, device):
        time.sleep(0.05)
        return toy.load(path, device)

    asked = {"artifact": "film"}
    metrics.artifact_load_seconds.clear()
    await make(load=slowly).run(await job_of(queue, "video", video_task()), Watch("video", "film"))
    assert 0.05 <= metrics.REGISTRY.get_sample_value("lowbit_artifact_load_seconds", asked) < 5


async def test_what_a_job_cached_and_where_is_told(make, queue, monkeypatch):
    run = toy.Toy.run
    took = [{"device": 4096}, {"host": 1024}]
    monkeypatch.setattr(toy.Toy, "run", lambda self, *given: replace(run(self, *given), cached=took.pop(0)))
    runner = make()

    async def told():
        await runner.run(await job_of(queue, "video", video_task()), Watch("video", "film"))
        places = ({"artifact": "film", "place": place} for place in ("device", "host"))
        return [metrics.REGISTRY.get_sample_value("lowbit_cache_bytes", place) for place in places]

    assert await told() == [4096, 0]
    assert await told() == [0, 1024]
    await runner.unload()
    places = ({"artifact": "film", "place": place} for place in ("device", "host"))
    assert [metrics.REGISTRY.get_sample_value("lowbit_cache_bytes", place) for place in places] == [None, None]


async def test_every_artifact_is_tested_on_the_device_that_will_run_it_and_one_that_is_refused_is_not_offered(make):
    asked = []

    def test(path, device, fallback):
        asked.append((path.name, device, fallback, threading.current_thread().name))
        verdict = "refused" if path.name == "film" else "passed"
        return toy.test(path, device, fallback).model_copy(update={"verdict": verdict})

    tested = make(test=test)
    assert tested.offered == ["film", "room"]
    await tested.test()
    assert asked == [("film", "cpu", False, "model"), ("room", "cpu", False, "model")]
    assert tested.offered == ["room"]
    assert {name: one.verdict for name, one in tested.tested.items()} == {"film": "refused", "room": "passed"}


async def test_the_settings_say_whether_it_is_tested_and_whether_another_version_may_take_a_place(make):
    asked = []
    test = lambda path, device, fallback: asked.append(fallback) or toy.test(path, device, fallback)  # noqa: E731
    await (off := make(test=test, selftest="off")).test()
    assert (asked, off.tested, off.offered) == ([], {}, ["film", "room"])
    await make(test=test, selftest="fallback").test()
    assert asked == [True, True]


async def test_where_a_test_changes_what_another_artifact_runs_by_that_is_tested_again(make):
    fell = []

    def test(path, device, fallback):
        if path.name == "room":
            fell.append(path)
        return toy.test(path, device, fallback).model_copy(update={"versions": {"op": "torch" if fell else "Triton"}})

    tested = make(test=test, selftest="fallback")
    await tested.test()
    assert {name: one.versions["op"] for name, one in tested.tested.items()} == {"film": "torch", "room": "torch"}
    assert len(fell) == 2


async def test_an_artifact_whose_test_raises_is_refused_with_the_reason(make):
    def test(path, device, fallback):
        raise ValueError("manifest.json: layers.x: Field required")

    tested = make(test=test)
    await tested.test()
    assert tested.offered == []
    assert tested.tested["film"].failures == {"artifact": "ValueError: manifest.json: layers.x: Field required"}


@pytest.mark.parametrize("raised", [True, False])  # out of the test, or told by it
async def test_a_test_that_runs_out_of_memory_is_done_again_until_there_is_some(make, raised):
    asked = []

    def test(path, device, fallback):
        asked.append(path.name)
        if asked.count("film") > 2 or path.name == "room":
            return toy.test(path, device, fallback)
        if raised:
            raise toy.OutOfMemoryError("others hold it")
        why = {"linear of 64": "OutOfMemoryError: others hold it"}
        return toy.test(path, device, fallback).model_copy(update={"verdict": "refused", "failures": why})

    tested = make(test=test)
    await tested.test()
    assert tested.offered == ["film", "room"]
    assert asked.count("film") == 3


async def test_an_artifact_that_never_has_the_memory_for_its_test_is_refused_in_the_end(make):
    asked = []

    def test(path, device, fallback):
        asked.append(path.name)
        raise MemoryError("too small")

    tested = make(test=test)
    await tested.test()
    assert tested.offered == []
    assert tested.tested["film"].failures == {"artifact": "MemoryError: too small"}
    assert asked.count("film") == runner.TESTS


async def test_the_model_s_folder_goes_with_the_run(make, queue, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    await make().run(await job_of(queue, "video", video_task()), Watch("video", "film"))
    assert not list(tmp_path.glob("lowbit-*"))


async def test_all_work_is_done_in_order_on_one_thread():
    thread = ModelThread()
    seen = await asyncio.gather(*(thread.call(lambda i=i: (i, threading.get_ident())) for i in range(20)))
    assert [i for i, _ in seen] == list(range(20))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()


async def test_the_thread_outlives_what_raises_and_what_nobody_waits_for():
    thread = ModelThread()
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    release = threading.Event()
    waiting = asyncio.create_task(thread.call(release.wait))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    release.set()
    assert await thread.call(lambda: 2) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("host"), "out-of-memory"),
        (toy.OutOfMemoryError("device"), "out-of-memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device-lost"),
        (NoRoom("others hold the rest"), "no-room"),
        (KeyError("x" * 10_000), "model-error"),
    ],
)
def test_reasons_are_a_closed_set_and_short(error, reason):
    problem = explain(error)
    assert reason_of(problem) == reason
    assert len(problem.detail) <= runner.LONGEST_DETAIL
