"""The F3 driver for `rdma://` and `srdma://`: FLARE's `Driver` and `Connection` on a link."""

from __future__ import annotations

from nvflare_rdma.driver.driver import RdmaDriver

__all__ = ["RdmaDriver"]
