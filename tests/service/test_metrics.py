from __future__ import annotations

from service import metrics
from service.queue.client import Lane, Stats, Swept
from tests.service.support import film, room


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"lowbit_{name}", labels) or 0.0


def test_the_names_follow_the_conventions():
    for family in metrics.REGISTRY.collect():
        assert ":" not in family.name
        if not family.name.startswith(("python_", "process_")):
            assert family.name.startswith("lowbit_")
            assert family.documentation


def test_what_time_did_is_counted_once_each():
    before = {o: value("jobs_finished_total", kind="video", artifact="m", outcome=o) for o in ("failed", "expired")}
    lost = value("job_failures_total", reason="worker-lost")
    metrics.count_swept([Swept("requeued", "video", "m"), Swept("dead", "video", "m"), Swept("expired", "video", "m")])
    after = {o: value("jobs_finished_total", kind="video", artifact="m", outcome=o) for o in ("failed", "expired")}
    assert after == {"failed": before["failed"] + 1, "expired": before["expired"] + 1}
    assert value("job_failures_total", reason="worker-lost") == lost + 2


def test_the_queue_is_shown_as_it_is_and_not_as_it_was():
    metrics.show_queue(Stats(3, 1, 2, 0, 4, (Lane("film", 3, 1.5, 10.0),)))
    assert value("queue_backlog_seconds", artifact="film") == 30
    assert value("queue_workers") == 4
    metrics.show_queue(None)
    assert value("queue_up") == 0
    assert metrics.REGISTRY.get_sample_value("lowbit_queue_depth", {"artifact": "film"}) is None
    assert value("queue_workers") != value("queue_workers")  # NaN: nobody knows


def test_a_worker_is_in_one_state_and_tells_what_it_holds():
    metrics.in_state("busy")
    assert [value("worker_state", state=state) for state in metrics.STATES] == [
        state == "busy" for state in metrics.STATES
    ]
    metrics.holds([film(), room()])
    assert value("artifact_info", artifact="film", family="wan", method="none", bits="W4A8", density="0.25") == 1
    assert value("artifact_info", artifact="room", family="vggt", method="none", bits="W8A8", density="1") == 1
