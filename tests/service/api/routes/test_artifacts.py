from __future__ import annotations

from service.jobs import SelfTest
from tests.service.support import film


async def test_artifacts_come_from_the_folders_and_from_the_workers(client, queue):
    await queue.beat("w1", [film("zebra"), film("aardvark"), film().model_copy(update={"kernels": {"int8": "onednn"}})])
    listed = (await client.get("/artifacts")).json()
    assert [(a["name"], a["workers"]) for a in listed] == [("film", 1), ("room", 0), ("aardvark", 1), ("zebra", 1)]
    assert listed[0]["kernels"] == {"int8": "onednn"}
    assert (listed[0]["bits"], listed[0]["density"]) == ("W4A8", 0.25)
    assert listed[0]["limits"]["size_multiple"] == 16
    assert listed[1]["limits"] == {"min_views": 2, "max_views": 4, "formats": ["glb", "ply", "cameras", "depth"]}


async def test_each_living_worker_says_what_its_self_test_found_and_is_counted_where_it_takes_jobs(client, queue):
    wrong = {"linear_w8a8": "Triton is off by 0.5, where 1e-06 is allowed"}
    refused = SelfTest(verdict="refused", device="NVIDIA B200", failures=wrong, seconds=3.5, cache="cold")
    passed = SelfTest(verdict="passed", device="NVIDIA H100", versions={"linear_w8a8": "Triton"}, seconds=1.5)
    await queue.beat("w1", [film()], {"film": refused})
    await queue.beat("w2", [film()], {"film": passed})
    listed = (await client.get("/artifacts")).json()[0]
    assert listed["workers"] == 1
    assert {worker: one["verdict"] for worker, one in listed["tested"].items()} == {"w1": "refused", "w2": "passed"}
    assert listed["tested"]["w1"]["failures"] == wrong
    assert listed["tested"]["w2"]["versions"] == {"linear_w8a8": "Triton"}
    await queue.leave("w1")
    assert [one.tested.keys() for one in await queue.artifacts()] == [{"w2"}]
