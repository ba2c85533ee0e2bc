"""How connections are counted by site."""

from __future__ import annotations

import pytest

from nvflare_rdma.driver import sites


class Connection:
    usable = idle = True

    def close(self, linger: float) -> None:
        raise OSError("it can't be closed")


@pytest.mark.parametrize(
    ("peer", "site"),
    [
        ("[2001:db8::1]:5", "2001:db8::/64"),
        ("[2001:db8::2]:5", "2001:db8::/64"),
        ("[2001:db8:0:1::2]:5", "2001:db8:0:1::/64"),
        ("[fe80::1%eth0]:5", "fe80::/64"),
        ("192.0.2.1:5", "192.0.2.1"),
        ("192.0.2.2:5", "192.0.2.2"),
        ("[2001:db8:1::9]:5", ""),  # this host
        ("N/A", ""),  # it has gone
    ],
)
@pytest.mark.parametrize("name", ["N/A", None])
def test_without_a_certificate_a_site_is_an_address_or_a_network_of_ipv6(peer, site, name):
    """Whoever has an IPv6 address usually has 2^64 of them, which are no sites of their own."""
    assert sites.site_of({"peer_addr": peer, "local_addr": "[2001:db8:1::9]:8002", "peer_cn": name}) == site


def test_a_certificate_says_more_than_an_address():
    properties = {"peer_addr": "192.0.2.1:5", "local_addr": "192.0.2.9:8002", "peer_cn": "site-1"}
    assert sites.site_of(properties) == "site-1"


def test_a_connection_that_makes_no_room_leaves_none_that_is_counted(monkeypatch):
    monkeypatch.setattr(sites, "MAX_CONNECTIONS_OF_SITE", 1)
    connections = sites.SiteConnections()
    with connections.counted("site-1", Connection()):
        with pytest.raises(OSError, match="can't be closed"), connections.counted("site-1", Connection()):
            pass
        assert len(connections._sites["site-1"]) == 1
    assert connections.sites == []
