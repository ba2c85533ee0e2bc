from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.settings import Settings, as_time, parse_settings


def test_defaults_and_overrides():
    assert parse_settings({}) == Settings()
    parsed = parse_settings({"rdma_fabrics": "tcp", "rdma_rails": "4", "rdma_chunk_bytes": 65536})
    assert (parsed.rdma_fabrics, parsed.rdma_rails, parsed.rdma_chunk_bytes) == (("tcp",), 4, 65536)


@pytest.mark.parametrize(("value", "means"), [(True, True), ("True", True), (" true", True), ("false", False)])
def test_a_truth_may_be_of_json_or_of_the_environment(value, means):
    assert parse_settings({"rdma_upgrade": value}).rdma_upgrade is means


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rdma_rail": 2}, r"unknown setting 'rdma_rail'=2. Allowed: rdma_fabrics, rdma_chunk_bytes"),
        ({"rdma_rails": "two"}, r"rdma_rails='two' is not a whole number. Allowed: 1 to 64"),
        ({"rdma_rails": 2.5}, r"rdma_rails=2.5 is not a whole number"),
        ({"rdma_rails": True}, r"rdma_rails=True is not a whole number"),
        ({"rdma_rails": 0}, r"rdma_rails=0 is out of range. Allowed: 1 to 64"),
        ({"rdma_chunk_bytes": 100}, r"rdma_chunk_bytes=100 is out of range. Allowed: 65536 to 67108864"),
        ({"rdma_fabrics": "infiniband"}, r"rdma_fabrics='infiniband': unknown fabric 'infiniband'"),
        ({"rdma_gid_index": -1}, r"rdma_gid_index=-1 is out of range. Allowed: 0 to 65535"),
        ({"rdma_gid_index": "auto"}, r"rdma_gid_index='auto' is not a whole number. Allowed: 0 to 65535"),
        ({"rdma_gid_index": ""}, r"rdma_gid_index='' is not a whole number"),
        ({"rdma_ack_timeout": 0}, r"rdma_ack_timeout=0 is out of range. Allowed: 1 to 31"),  # 0 waits for ever
        ({"rdma_ack_timeout": 32}, r"rdma_ack_timeout=32 is out of range. Allowed: 1 to 31"),
        ({"rdma_patience": "soon"}, r"rdma_patience='soon' is no time. Allowed: seconds, or a text such as .* 24 h"),
        ({"rdma_patience": "4h30m"}, r"rdma_patience='4h30m' is no time"),
        ({"rdma_patience": -1}, r"rdma_patience=-1 is no time"),
        ({"rdma_patience": True}, r"rdma_patience=True is no time"),
        ({"rdma_patience": 0}, r"rdma_patience=0 is out of range. Allowed: .*1 s to 24 h"),
        ({"rdma_patience": "25h"}, r"rdma_patience='25h' is out of range"),
        ({"rdma_upgrade": "yes"}, r"rdma_upgrade='yes' is neither true nor false. Allowed: true, false"),
        ({"rdma_upgrade": 1}, r"rdma_upgrade=1 is neither true nor false"),
        ({"rdma_retry_count": 8}, r"rdma_retry_count=8 is out of range. Allowed: 0 to 7"),
    ],
)
def test_a_bad_setting_names_key_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(values)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("30m", 1800), ("4h", 14400), ("24h", 86400), ("90s", 90), ("90", 90), (90, 90), (1.5, 1.5), (" 1.5 H ", 5400)],
)
def test_patience_is_a_time(value, seconds):
    assert parse_settings({"rdma_patience": value}).rdma_patience == seconds


def test_a_time_is_said_as_short_as_it_can_be():
    assert [as_time(each) for each in (14400.0, 1800.0, 90.0, 5400.0, 0.5)] == [
        "4 h",
        "30 min",
        "90 s",
        "90 min",
        "0.5 s",
    ]


def test_the_documentation_has_a_row_for_each_setting():
    text = (Path(__file__).parents[1] / "docs/settings.md").read_text()
    rows = re.findall(r"^\| `(rdma_\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(each.name for each in fields(Settings))


def verbs(**values):
    return parse_settings(values).verbs


def test_rdma_settings_reach_the_verbs_fabric():
    assert verbs() == VerbsOptions((), None, False, 16, 6)
    assert verbs(rdma_gid_index="3", rdma_ack_timeout="20", rdma_retry_count="7") == VerbsOptions(
        (), 3, False, ack_timeout=20, retries=7
    )
    assert verbs(rdma_gid_index=0).gid_index == 0


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        ("", ()),
        (" , ", ()),
        ("mlx5_0", ("mlx5_0",)),
        (" mlx5_0:1 , mlx5_1,", ("mlx5_0:1", "mlx5_1")),
    ],
)
def test_devices_are_a_list_of_names(value, devices):
    assert parse_settings({"rdma_device": value}).rdma_device == devices
    assert verbs(rdma_device=value).devices == devices


@pytest.mark.parametrize(
    ("values", "software"),
    [
        ({}, False),
        ({"rdma_device": ""}, False),
        ({"rdma_device": "rxe0"}, True),
        ({"rdma_fabrics": "verbs"}, True),
        ({"rdma_fabrics": "verbs,tcp"}, False),
        ({"rdma_fabrics": "tcp"}, False),
    ],
)
def test_software_rdma_has_to_be_asked_for(values, software):
    assert verbs(**values).software is software
