from __future__ import annotations

import asyncio

from service.jobs import Progress
from service.queue import follow
from service.queue.follow import Followers
from tests.service.queue.test_client import RESULT, claim, submit
from tests.service.support import new_id


async def collect(followers: Followers, job_id: str, after: int = 0) -> list[int]:
    return [event.number async for event in followers.follow(job_id, after)]


async def test_many_followers_see_every_event_as_it_happens(queue, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 60.0)  # so that only the bell can wake them
    followers = Followers(queue)
    job_id = await submit(queue)
    watching = [asyncio.create_task(collect(followers, job_id)) for _ in range(5)]
    await asyncio.sleep(0.2)
    lease = await claim(queue)
    for step in (1, 2, 3):
        await queue.renew(lease, Progress(step=step, of=3))
        await asyncio.sleep(0.01)
    await queue.finish(lease, [RESULT])
    async with asyncio.timeout(5):
        assert await asyncio.gather(*watching) == [[1, 2, 3, 4, 5, 6]] * 5
    await followers.close()


async def test_following_what_has_ended_replays_and_ends(queue):
    followers = Followers(queue)
    job_id = await submit(queue)
    await queue.finish(await claim(queue), [RESULT])
    async with asyncio.timeout(2):
        assert await collect(followers, job_id, after=1) == [2, 3]
        assert await collect(followers, job_id, after=3) == []
        assert await collect(followers, new_id()) == []
    await followers.close()


async def test_a_lost_ring_costs_a_poll_and_no_event(queue, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(Followers, "_listen", lambda self: asyncio.sleep(3600))
    followers = Followers(queue)
    job_id = await submit(queue)
    watching = asyncio.create_task(collect(followers, job_id))
    await asyncio.sleep(0.05)
    await queue.finish(await claim(queue), [RESULT])
    async with asyncio.timeout(2):
        assert await watching == [1, 2, 3]
    await followers.close()


async def test_listening_stops_when_it_is_told_to(queue):
    for moment in range(150):  # at any point of connecting, subscribing and waiting
        followers = Followers(queue)
        listening = asyncio.create_task(followers._listen())
        await asyncio.sleep(moment * 2e-5)
        listening.cancel()
        done, _ = await asyncio.wait([listening], timeout=5)
        assert done
