"""Where exported jobs of the first release have `RdmaTransfer`: it is in `nvflare_rdma.streaming` now."""

from __future__ import annotations

from nvflare_rdma.streaming.component import RdmaTransfer

__all__ = ["RdmaTransfer"]
