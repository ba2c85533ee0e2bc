"""FLARE's large objects on the channel."""

from importlib import import_module
from typing import Any

_MODULES = {
    "ContainerRetriever": "streams.containers",
    "ContainerStreamer": "streams.containers",
    "FileRetriever": "streams.files",
    "FileStreamer": "streams.files",
    "RdmaTransfer": "component",
}
__all__ = ["ContainerRetriever", "ContainerStreamer", "FileRetriever", "FileStreamer", "RdmaTransfer"]


def __getattr__(name: str) -> Any:
    """On demand, because they import FLARE."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(name)
