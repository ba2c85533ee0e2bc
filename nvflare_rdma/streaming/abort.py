"""How a download ends early as FLARE's do: its receiver aborts, or its sender has died.

FLARE has this inside its own downloads and offers no way to it: this reaches into `DownloadService`. `RdmaTransfer` has
checked FLARE's version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.streaming.download_service import (
    OBJ_DOWNLOADER_CHANNEL,
    OBJ_DOWNLOADER_TOPIC,
    DownloadService,
    _PropKey,
)


@contextlib.contextmanager
def abortable(cell: Any, source: str, ref_id: str, abort_signal: Signal | None) -> Iterator[Signal]:
    """A signal that is triggered when ``abort_signal`` is, or when FLARE says that ``source`` has died."""
    signal = DownloadService._register_source_download(cell, source, ref_id, abort_signal)
    try:
        yield signal
    finally:
        DownloadService._unregister_source_download(source, ref_id, signal)


def cancel(cell: Any, source: str, ref_id: str, secure: bool, optional: bool) -> None:
    """Tell the sender's transaction that this receiver does not go on: it need not wait for the receiver's time to be
    up. What is lost on the way does no more harm than that."""
    cell.fire_and_forget(
        channel=OBJ_DOWNLOADER_CHANNEL,
        topic=OBJ_DOWNLOADER_TOPIC,
        targets=source,
        message=new_cell_message({}, {_PropKey.REF_ID: ref_id, _PropKey.CANCEL: True}),
        secure=secure,
        optional=optional,
    )
