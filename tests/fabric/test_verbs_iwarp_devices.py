"""An iWARP port is reached by the addresses of its interface."""

from __future__ import annotations

import ipaddress

import pytest

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric import verbs_devices
from nvflare_rdma.fabric.verbs_devices import VerbsOptions, choose_gid, list_ports

FOUR, SIX, LINK = "192.0.2.1", "2001:db8::1", "fe80::1"


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A function: the iWARP port of an interface that has the ``addresses``."""

    def made(*addresses):
        port = tmp_path / "sw0" / "ports" / "1"
        for name in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (port / name).mkdir(parents=True)
        (tmp_path / "sw0" / "node_type").write_text("4: RNIC\n")
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text("10 Gb/sec (4X SDR)\n")
        (port / "gids" / "0").write_text("0200:0000:0000:0000:0000:0000:0000:0000\n")  # the MAC address
        (port / "gid_attrs" / "types" / "0").write_text("IB/RoCE v1\n")
        (port / "gid_attrs" / "ndevs" / "0").write_text("eth7\n")
        have = {"eth7": [ipaddress.ip_address(address) for address in addresses]}
        monkeypatch.setattr(verbs_devices, "addresses_of", lambda interface: have.get(interface, []))
        (found,) = list_ports(tmp_path)
        return found

    return made


def test_its_gids_are_the_addresses_that_others_can_reach(port):
    found = port(LINK, FOUR, SIX)
    assert found.transport == "iWARP"
    assert [(gid.index, str(gid.address), gid.family, gid.netdev) for gid in found.gids] == [
        (0, FOUR, "iWARP over IPv4", "eth7"),
        (1, SIX, "iWARP over IPv6", "eth7"),
    ]


@pytest.mark.parametrize(
    ("near", "family", "expected", "why"),
    [
        ("", "", FOUR, "iWARP, IPv4"),
        (SIX, "", SIX, "the address of the control stream"),
        ("", "iWARP over IPv6", SIX, "iWARP, IPv6"),
    ],
)
def test_which_one_is_used(port, near, family, expected, why):
    gid, reason = choose_gid(port(SIX, FOUR), VerbsOptions(), ipaddress.ip_address(near) if near else None, family)
    assert (str(gid.address), reason) == (expected, why)


def test_without_an_address_there_is_nothing_to_reach_it_by(port):
    with pytest.raises(FabricUnavailable, match="its interface needs an IP address"):
        choose_gid(port(LINK), VerbsOptions())
