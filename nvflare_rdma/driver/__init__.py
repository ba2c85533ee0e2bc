"""The F3 driver for `rdma://` and `srdma://`: FLARE's `Driver` and `Connection` on a link. Where it is asked for, also
for FLARE's own `tcp://` and `stcp://`."""

from __future__ import annotations

from nvflare_rdma.driver.driver import RdmaDriver
from nvflare_rdma.driver.upgrade import UpgradedTcpDriver, take_over_where_asked

__all__ = ["RdmaDriver", "UpgradedTcpDriver", "take_over_where_asked"]
