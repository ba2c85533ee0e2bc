"""What FLARE loads in the process of a Client API trainer: see `nvflare_rdma.streaming.trainer`. It imports every file
of this folder, so it holds only this one."""

from __future__ import annotations

from nvflare_rdma.streaming import install_in_trainer

install_in_trainer()
