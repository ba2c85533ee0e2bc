"""FLARE's large objects on the channel."""

from importlib import import_module
from typing import Any

_MODULES = {
    "ContainerRetriever": "container_retriever",
    "ContainerStreamer": "container_streamer",
    "FileRetriever": "file_retriever",
    "FileStreamer": "file_streamer",
    "RdmaTransfer": "transfer",
}
__all__ = ["ContainerRetriever", "ContainerStreamer", "FileRetriever", "FileStreamer", "RdmaTransfer"]


def __getattr__(name: str) -> Any:
    """On demand, because they import FLARE."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(name)
