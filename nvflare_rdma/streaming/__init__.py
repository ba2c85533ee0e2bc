"""FLARE's large objects on the channel."""

from typing import Any

__all__ = ["RdmaTransfer"]


def __getattr__(name: str) -> Any:
    """On demand, because it imports FLARE."""
    if name == "RdmaTransfer":
        from nvflare_rdma.streaming.transfer import RdmaTransfer

        return RdmaTransfer
    raise AttributeError(name)
