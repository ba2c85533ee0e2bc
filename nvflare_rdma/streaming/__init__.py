"""FLARE's large objects over links of this package: tensors in messages, containers and files.

Everything here is imported when it is asked for, because it imports FLARE.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "ContainerRetriever": "streams.containers",
    "ContainerStreamer": "streams.containers",
    "FileRetriever": "streams.files",
    "FileStreamer": "streams.files",
    "ParentDoor": "parents",
    "RdmaTransfer": "component",
    "install_in_trainer": "component",
}
__all__ = [
    "ContainerRetriever",
    "ContainerStreamer",
    "FileRetriever",
    "FileStreamer",
    "ParentDoor",
    "RdmaTransfer",
    "install_in_trainer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
