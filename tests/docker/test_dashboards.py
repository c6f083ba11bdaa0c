"""Every query of the dashboard and of the alerts can be parsed, and asks for metrics and labels that we export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser as promql
import pytest
import yaml

from service import metrics

ROOT = Path(__file__).parents[2]
BOARD = json.loads((ROOT / "docker/grafana/dashboards/latency.json").read_text())
ALERTS = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exported() -> dict[str, set[str]]:
    """name -> its labels, of every series."""
    found = {}
    for collector in set(metrics.REGISTRY._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            for suffix in SUFFIXES.get(family.type, ("",)):
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def queries() -> list[str]:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    return shown + [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def selectors(node) -> list:
    """Every selector in a parsed query."""
    if isinstance(node, promql.VectorSelector):
        return [node]
    if isinstance(node, promql.MatrixSelector):
        return selectors(node.vector_selector)
    inner = [getattr(node, name) for name in ("expr", "lhs", "rhs", "param") if hasattr(node, name)]
    inner += list(getattr(node, "args", None) or [])
    return [selector for one in inner if one is not None for selector in selectors(one)]


def parsed(query: str):
    return promql.parse(query.replace("$__rate_interval", "5m").replace("$artifact", ".*"))


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_exported(query):
    known = exported()
    found = selectors(parsed(query))
    assert found
    for selector in found:
        assert selector.name in known
        asked = {matcher.name for matcher in selector.matchers.matchers} - {"__name__"}
        assert asked <= known[selector.name]
    grouped = {label.strip() for names in re.findall(r"by \(([^)]*)\)", query) for label in names.split(",")}
    assert grouped <= set().union(*(known[selector.name] for selector in found))


def test_a_query_with_a_slip_is_found_out():
    with pytest.raises(ValueError):
        parsed("sum(rate(lowbit_jobs_finished_total[5m])")
    assert selectors(parsed("sum(lowbit_no_such_metric)"))[0].name not in exported()


def test_every_metric_of_ours_but_the_raw_counts_is_shown():
    """A metric that no panel shows is one that nobody looks at."""
    asked = {selector.name for query in queries() for selector in selectors(parsed(query))}
    ours = {name for name in exported() if name.startswith("lowbit_")}
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in ours} == shown


def test_panels_do_not_overlap_and_know_their_source():
    places = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places
        places |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "prometheus"
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
