"""What single transfers of a job did: `reporting` shows their records where FLARE's users look, with `pools`.

What imports FLARE is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from nvflare_rdma.metrics.names import TRANSFERS_FILE

_MODULES = {"TransferReporter": "reporting"}
__all__ = ["TRANSFERS_FILE", "TransferReporter"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
