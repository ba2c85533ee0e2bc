"""`nvflare-rdma status` on kits that FLARE's own provisioning has made."""

from __future__ import annotations

import json

import pytest

from nvflare_rdma import class_list
from tests.support.kits import (
    ALL,
    SERVER,
    SITE_1,
    SITE_2,
    change,
    run,
)


def test_status_says_what_is_set_where_and_by_whom(workspace, kits, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("enable", kits / SERVER, *ALL) == 0
    change(kits / SITE_2 / "local/comm_config.json", rdma_rails=4)
    capsys.readouterr()
    assert run("status", workspace) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    for word in (
        "memory_budget_bytes=268435456",
        "patience=4h",
        "enable",
        "hand",
        "defaults",
        "allowed",
        "refused",
    ):
        assert word in out, out
    assert run("status", workspace, "--format", "json") == 0
    sites = {each["site"]: each for each in json.loads(capsys.readouterr().out)["data"]["sites"]}
    assert {name for name, each in sites.items() if each["role"] != "admin"} == {SERVER, SITE_1, SITE_2}
    server = sites[SERVER]
    assert server["settings"] == {
        "rdma_fabrics": "shm,tcp",
        "rdma_memory_budget_bytes": 256 << 20,
        "rdma_patience": "4h",
        "rdma_upgrade": True,
        "rdma_data_ports": "20000-20010",
    }
    assert (server["enabled"], server["driver"], server["parent_door"], server["classes_missing"]) == (
        True,
        True,
        True,
        [],
    )
    assert (sites[SITE_2]["enabled"], sites[SITE_2]["settings"]) == (False, {"rdma_rails": 4})
    assert sites[SITE_1]["classes_missing"] == list(class_list.ENTRIES)
    assert all(each["problems"] == [] for each in sites.values())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rdma_rails": 400}, "rdma_rails=400 is out of range"),
        ({"rdma_upgrade": True}, "rdma_upgrade does nothing, as comm_driver_path has no folder of the driver"),
        ({"comm_driver_path": "/gone/nvflare_rdma/plugin"}, "names /gone/nvflare_rdma/plugin, which has no driver"),
    ],
)
def test_status_finds_what_would_not_work(kits, capsys, values, says):
    change(kits / SITE_1 / "local/comm_config.json", **values)
    assert run("status", kits / SITE_1) == 1
    assert says in capsys.readouterr().out


def test_status_of_a_kit_that_cannot_be_read_tells_the_rest(kits, capsys):
    (kits / SITE_1 / "local/comm_config.json").write_text("{")
    assert run("status", kits, "--format", "json") == 1
    envelope = json.loads(capsys.readouterr().out)
    problems = {each["site"]: each["problems"] for each in envelope["data"]["sites"]}
    assert "is no JSON" in problems.pop(SITE_1)[0]
    assert not any(problems.values())
