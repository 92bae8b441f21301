"""The dashboard and the alerts of the documentation ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from prometheus_client import CollectorRegistry

from asyncdp import Batcher, Runtime, export_prometheus

pytestmark = pytest.mark.anyio

_DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((_DOCS / "grafana.json").read_text())
PAGE = (_DOCS / "serving.md").read_text()
ALERTS = re.findall(r"^# .*\n(.+)$", re.search(r"```promql\n(.*?)```", PAGE, re.S)[1], re.M)  # type: ignore[index]
METRIC = re.compile(r"asyncdp_batcher_\w+")


def queries() -> list[str]:
    variables = {"$__rate_interval": "5m", "$batcher": ".*"}
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for name, value in variables.items():
        found = [query.replace(name, value) for query in found]
    return found


async def exported() -> dict[str, set[str]]:
    """Return the labels of everything that is exported, by its name in a scrape."""
    registry = CollectorRegistry()
    async with Runtime("cpu") as runtime, Batcher(torch.neg, runtime=runtime) as batcher:
        export_prometheus(batcher, registry)
        samples = [sample for family in registry.collect() for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


async def test_the_dashboard_asks_for_metrics_that_are_exported() -> None:
    """Every name in a query is in a scrape, with the labels that the query groups or selects by."""
    names = await exported()
    asked = [*queries(), *ALERTS]
    assert len(ALERTS) == 4
    for query in asked:
        found = METRIC.findall(query)
        assert found
        assert set(found) <= set(names), query
        labels = re.findall(r"by \((.*?)\)", query) + re.findall(r"\{(\w+)=", query)
        used = {label.strip() for each in labels for label in each.split(",")}
        assert used <= set.union(*(names[name] for name in found)), query
    variable = next(each for each in DASHBOARD["templating"]["list"] if each["name"] == "batcher")
    assert set(METRIC.findall(variable["query"]["query"])) <= set(names)


async def test_the_table_lists_every_metric() -> None:
    """The table of the documentation lists what is exported, and nothing else."""
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in await exported()}
    table = re.search(r"\| Prometheus.*?\n\n", PAGE, re.S)
    assert table
    listed = {
        name
        for row in table[0].strip().splitlines()[2:]
        for name in re.findall(r"`([a-z_]+)(?:\{\w+=\})?`", row.split("|")[1])
    }
    assert {f"asyncdp_batcher_{name}" for name in listed} == families


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """Panels have ids of their own, do not lie on each other, and use the data source that the user picks."""
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"__rate_interval", "batcher"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    """Queries and alerts are valid PromQL."""
    rules = [
        {"record": f"test:{number}", "expr": query} for number, query in enumerate([*queries(), *ALERTS])
    ]
    file = anyio.Path(tmp_path / "rules.yml")
    await file.write_text(json.dumps({"groups": [{"name": "test", "rules": rules}]}))  # JSON is YAML
    checked = await anyio.run_process(["promtool", "check", "rules", str(file)], check=False)
    assert checked.returncode == 0, checked.stderr.decode()
