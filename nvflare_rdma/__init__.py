"""RDMA-chunked streaming and few-bit messages for NVIDIA FLARE.

Importing this package imports neither FLARE nor torch: each layer imports what it needs when it is used.
"""

from __future__ import annotations

from nvflare_rdma.version import __version__

__all__ = ["__version__"]
