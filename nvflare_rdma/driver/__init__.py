"""The F3 driver: a thin adapter from FLARE's Connection to the channel."""

from nvflare_rdma.driver.driver import RdmaDriver

__all__ = ["RdmaDriver"]
