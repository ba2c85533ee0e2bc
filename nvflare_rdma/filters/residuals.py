"""Residuals: what the last message of a stream lacked, to be added to the next one.

A residual is staged when its message is encoded, and committed when an event of FLARE shows that the message was
handed over: on a client that the task's result was sent, on the server that a site's result for the task came in.
One that is still staged when the stream's next message is encoded belongs to a message that nobody got, and is
dropped. Committed residuals are saved in the job's run folder, so that they outlive the process.

Kept in bfloat16: two bytes a value, and what that rounding loses is 2**-9 of what one message lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from nvflare_rdma.codecs import Array
from nvflare_rdma.logs import get_logger

Bits = NDArray[np.uint16]

log = get_logger(__name__)

_OWNER_ONLY = 0o600
_NUMBER = "\0number "


class Residuals:
    """The residuals of one filter, by stream and tensor name: arrays of the tensor's shape, bfloat16 bits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._committed: dict[str, Mapping[str, Bits]] = {}
        self._staged: dict[str, dict[str, Bits]] = {}

    def committed(self, stream: str) -> Mapping[str, Bits]:
        """Return the committed residuals of a stream as they are now; a later commit doesn't change them."""
        with self._lock:
            return self._committed.get(stream, {})

    def stage(self, stream: str, residuals: dict[str, Bits]) -> None:
        """Keep what the message that was just encoded lacked until it is known whether the message was sent."""
        with self._lock:
            if self._staged.pop(stream, None) is not None:
                log.warning(
                    "error feedback of '%s': the message before this one was not seen to be sent; what it lacked is "
                    "not made up for",
                    stream,
                )
            self._staged[stream] = residuals

    def commit(self, task: str, folder: str | None) -> None:
        """Use from now on what was staged for the streams of `task`, since it was sent, and save it to `folder`. What
        can't be saved is used all the same; the log has it."""
        with self._lock:
            streams = [s for s in self._staged if s == task or s.startswith(f"{task}/")]
            for stream in streams:
                self._committed[stream] = self._staged.pop(stream)
            if folder is None:
                return
            from safetensors import SafetensorError

            for stream in streams:
                try:
                    _save(folder, stream, self._committed[stream])
                except (OSError, SafetensorError) as error:  # it has errors of its own for a disk that is full
                    _forget(folder, stream)
                    log.warning(
                        "error feedback of '%s' can't be saved in %s, so it would start anew with the process: %s; "
                        "free disk space there, and see that it may be written to",
                        *(stream, folder, error),
                    )

    def drop_staged(self, task: str) -> None:
        """Forget what was staged for the streams of `task`: the message will not be sent."""
        with self._lock:
            for stream in [s for s in self._staged if s == task or s.startswith(f"{task}/")]:
                del self._staged[stream]

    def restore(self, stream: str, folder: str) -> None:
        """Load what was saved of a stream that this object doesn't know yet."""
        with self._lock:
            if stream not in self._committed and stream not in self._staged:
                self._committed[stream] = _load(folder, stream)


def fitting(residuals: Mapping[str, Bits], name: str, shape: tuple[int, ...]) -> Bits | None:
    """Return a tensor's residual, flat, or None if there is none or the tensor had another shape."""
    residual = residuals.get(name)
    return residual.reshape(-1) if residual is not None and residual.shape == shape else None


def _file(folder: str, stream: str) -> str:
    """Task names may hold any character; the hash keeps two that look alike apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", stream)[:60]
    return os.path.join(folder, f"residual-{plain}-{xxhash.xxh3_64_hexdigest(stream.encode())}.safetensors")


def _save(folder: str, stream: str, residuals: Mapping[str, Array]) -> None:
    from safetensors.numpy import save_file

    os.makedirs(folder, exist_ok=True)
    path = _file(folder, stream)
    # It tells about a site's data, so nobody else reads it: what is written keeps the mode of the file that is there.
    fd = os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, _OWNER_ONLY)
    try:
        os.fchmod(fd, _OWNER_ONLY)  # one that a process left that has died
    finally:
        os.close(fd)
    # Renamed when whole: a process that dies while it writes leaves the old file.
    named = {_saved_name(name): residual for name, residual in residuals.items()}
    save_file(named, f"{path}.new", metadata={"stream": stream})
    os.replace(f"{path}.new", path)


def _forget(folder: str, stream: str) -> None:
    """Remove what is saved of a stream: a message has made up for it, and no other one may."""
    path = _file(folder, stream)
    for each in (f"{path}.new", path):
        with contextlib.suppress(OSError):
            os.remove(each)


def _saved_name(name: Any) -> str:
    """FLARE's filters take numbers for names, too; the file has texts only, and none of a model begins so."""
    return name if isinstance(name, str) else f"{_NUMBER}{name}"


def _loaded_name(name: str) -> Any:
    digits = name.removeprefix(_NUMBER)
    return int(digits) if name != digits and digits.lstrip("-").isdecimal() else name


def _load(folder: str, stream: str) -> dict[str, Bits]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = _file(folder, stream)
    if not os.path.exists(path):
        return {}
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        log.warning("error feedback of '%s' starts anew: %s can't be read: %s", stream, path, error)
        return {}
    return {_loaded_name(name): bits for name, bits in loaded.items() if bits.dtype == np.uint16}
