"""How connections are counted by site."""

from __future__ import annotations

import pytest

from nvflare_rdma.driver import sites


class Connection:
    usable = idle = True

    def close(self, linger: float) -> None:
        raise OSError("it can't be closed")


def test_a_connection_that_makes_no_room_leaves_none_that_is_counted(monkeypatch):
    monkeypatch.setattr(sites, "MAX_CONNECTIONS_OF_SITE", 1)
    connections = sites.SiteConnections()
    with connections.counted("site-1", Connection()):
        with pytest.raises(OSError, match="can't be closed"), connections.counted("site-1", Connection()):
            pass
        assert len(connections._sites["site-1"]) == 1
    assert connections.sites == []
