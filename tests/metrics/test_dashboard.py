"""The dashboard asks for the gauges that are sent, and is built as Grafana expects it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from nvflare_rdma.metrics.reporting import figures_of
from tests.support.transfer_records import record

ROOT = Path(__file__).resolve().parents[2]
#: What a server adds whose results wait until they are added (`accumulate.holdings`).
OF_THE_SERVER = {
    "results_held_peak_bytes",
    "results_on_disk_peak_bytes",
    "results_added_bytes",
    "results_decoded_bytes",
}
WIDTH = 24


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((ROOT / "nvflare_rdma" / "dashboards" / "grafana.json").read_text())


def test_it_shows_every_gauge_and_no_other(dashboard):
    sent = figures_of([record(), record(direction="received")]).keys() | OF_THE_SERVER
    source = "\n".join(path.read_text() for path in (ROOT / "nvflare_rdma").rglob("*.py"))
    assert all(f'"{name}"' in source for name in OF_THE_SERVER)
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for expr in asked for name in re.findall(r"rdma_(\w+)\{", expr)} == sent
    assert all('{job_id=~"$job", site=~"$site"}' in expr for expr in asked)


def test_its_parts_are_whole(dashboard):
    panels = dashboard["panels"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables.keys() == {"source", "job", "site"}
    assert variables["source"]["type"] == "datasource"
    source = {"type": "prometheus", "uid": "${source}"}
    assert all(variables[name]["datasource"] == source for name in ("job", "site"))
    assert all(panel["datasource"] == source and panel["title"] and panel["fieldConfig"] for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids)
    taken = [(x, y) for panel in panels for x, y in cells(panel["gridPos"])]
    assert len(set(taken)) == len(taken), "panels lie over each other"
    assert max(x for x, _ in taken) < WIDTH


def cells(place):
    return [
        (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    ]
