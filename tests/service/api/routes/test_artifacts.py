from __future__ import annotations

from tests.service.support import film


async def test_artifacts_come_from_the_folders_and_from_the_workers(client, queue):
    await queue.beat("w1", [film("zebra"), film("aardvark"), film().model_copy(update={"kernels": {"int8": "onednn"}})])
    listed = (await client.get("/artifacts")).json()
    assert [(a["name"], a["workers"]) for a in listed] == [("film", 1), ("room", 0), ("aardvark", 1), ("zebra", 1)]
    assert listed[0]["kernels"] == {"int8": "onednn"}
    assert (listed[0]["bits"], listed[0]["density"]) == ("W4A8", 0.25)
    assert listed[0]["limits"]["size_multiple"] == 16
    assert listed[1]["limits"] == {"min_views": 2, "max_views": 4, "formats": ["glb", "ply", "cameras", "depth"]}
