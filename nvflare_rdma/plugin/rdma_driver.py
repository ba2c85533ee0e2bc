"""What FLARE's `comm_driver_path` loads. FLARE imports every file of this folder, so it holds only this one."""

from __future__ import annotations

from nvflare_rdma.driver import RdmaDriver, take_over_where_asked
from nvflare_rdma.runtime import large_tensors_in_huge_pages

large_tensors_in_huge_pages()  # here, since a process loads its drivers before it makes a model
# Not a class of this module: FLARE would register it for schemes that it has a driver for, and log an error.
take_over_where_asked()

__all__ = ["RdmaDriver"]
