"""What FLARE's `comm_driver_path` loads. FLARE imports every file of this folder, so it holds only this one."""

from __future__ import annotations

from nvflare_rdma.driver import RdmaDriver

__all__ = ["RdmaDriver"]
