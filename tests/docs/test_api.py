"""The page tells every setting, problem, reason and metric that there is, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

from service import metrics
from service.api.app import create_app
from service.api.problems import TYPES
from service.jobs import JobStatus, Reason
from service.queue.client import Queue
from service.results import Results
from service.settings import PREFIX, Settings

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> set[str]:
    """The code words in the first cell of each row of the tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def test_every_setting_and_no_other():
    assert {PREFIX + name for name in first_cells(section("Settings"))} == {
        PREFIX + name.upper() for name in Settings.model_fields
    }


def test_every_problem_and_reason_and_no_other():
    assert first_cells(section("Problems")) == set(TYPES) | set(Reason)
    told = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", section("Problems"), re.M)
    assert dict(told) == {slug: str(status) for slug, (status, _) in TYPES.items()}


def test_every_metric_with_its_labels_and_no_other():
    told = first_cells(section("Metrics"))
    exported = {
        family.name.removeprefix("lowbit_") + ("_total" if family.type == "counter" else "")
        for family in metrics.REGISTRY.collect()
        if family.name.startswith("lowbit_")
    }
    assert told == exported


def test_every_status_and_route():
    assert {status.value for status in JobStatus} <= first_cells(section("A job"))
    settings = Settings()
    app = create_app(
        settings.model_copy(update={"artifacts": ()}), Queue.open("unix:///nowhere", settings), Results("memory:///")
    )
    paths = {path.replace("{job_id}", "{id}") for path in app.openapi()["paths"]}
    told = {re.sub(r"\?.*", "", path) for path in re.findall(r"`(?:GET|POST|DELETE) (/[^`]*)`", section("Endpoints"))}
    assert told - {"/metrics"} == paths
