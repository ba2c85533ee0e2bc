"""An iWARP port is reached by the addresses of its interface."""

from __future__ import annotations

import ipaddress

import pytest

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.verbs import devices
from nvflare_rdma.fabric.verbs.devices import choose_gid, list_ports
from tests.support.fake_sysfs import FakeSysfs

FOUR, SIX, LINK = "192.0.2.1", "2001:db8::1", "fe80::1"


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A function: the iWARP port of an interface that has the ``addresses``."""

    def made(*addresses):
        FakeSysfs(tmp_path).siw()
        have = {"vc": [ipaddress.ip_address(address) for address in addresses]}
        monkeypatch.setattr(devices, "addresses_of", lambda interface: have.get(interface, []))
        (found,) = list_ports(tmp_path)
        return found

    return made


def test_its_gids_are_the_addresses_that_others_can_reach(port):
    found = port(LINK, FOUR, SIX)
    assert found.transport == "iWARP"
    assert [(gid.index, str(gid.address), gid.family, gid.netdev) for gid in found.gids] == [
        (0, FOUR, "iWARP over IPv4", "vc"),
        (1, SIX, "iWARP over IPv6", "vc"),
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
