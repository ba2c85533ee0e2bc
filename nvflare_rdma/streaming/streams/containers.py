"""FLARE's `ContainerStreamer`, whose tensors go from memory to memory over links: see `sender`.

The sender's tensors and arrays are sent as they are, and received into memory of their own. Keys and all other entries
go with FLARE's messages, some at a time; what is in them is FLARE's to serialize.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.streaming import StreamableEngine
from nvflare.app_common.streamers import container_retriever as flare_retriever
from nvflare.app_common.streamers import container_streamer as flare
from nvflare.fuel.utils.class_loader import get_class_name, load_class
from nvflare.fuel.utils.validation_utils import check_positive_number

from nvflare_rdma.codecs import is_torch
from nvflare_rdma.errors import ProtocolError, RdmaError, TransferError
from nvflare_rdma.flare_compat import container_keys
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.streams import sender
from nvflare_rdma.streaming.streams.messages import PREFIX
from nvflare_rdma.streaming.streams.receiver import Receiving, register
from nvflare_rdma.transfer import (
    AbortedError,
    Meter,
    Meters,
    PeerLinks,
    Service,
    TensorContent,
    in_memory,
    is_sendable,
    pull,
    raw_bytes,
)

_FLARES = container_keys()

_ENTRY_TIMEOUT = 60.0
#: So many entries that are no tensors, or so many bytes of them, go in one message. Entries of other types than these
#: go alone, as nobody knows how many bytes are in them.
_SMALL = (int, float, bool, str, bytes, type(None))
_ROWS, _ROW_BYTES = 4096, 1 << 20
#: A receiver gives up after so long without any message from the sender.
_WAIT_SECONDS = 120.0
_LOOK_SECONDS = 0.2
_BATCH_COUNT = PREFIX + "portions"


class ContainerStreamer(flare.ContainerStreamer):
    """Streams dicts, lists and sets, with the methods, arguments, callbacks and results of FLARE's."""

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    @staticmethod
    def register_stream_processing(
        fl_ctx: FLContext, channel: str, topic: str, stream_done_cb: Any = None, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        flare.ContainerStreamer.register_stream_processing(fl_ctx, channel, topic, stream_done_cb, **cb_kwargs)
        callbacks = {"stream_done_cb": stream_done_cb, **cb_kwargs}
        register(fl_ctx.get_engine(), channel, topic, ContainerReceiving, callbacks)

    @staticmethod
    def stream_container(  # noqa: PLR0913 - the signature is FLARE's
        channel: str,
        topic: str,
        stream_ctx: Any,
        targets: list[str],
        container: Any,
        fl_ctx: FLContext,
        entry_timeout: float | None = None,
        optional: bool = False,
        secure: bool = False,
    ) -> tuple[str, Any]:
        """See FLARE's; the result is (return code, whether all targets have it). An entry's timeout is that of a
        message; tensors may take as long as they move."""
        if not entry_timeout:
            entry_timeout = _ENTRY_TIMEOUT
        check_positive_number("entry_timeout", entry_timeout)
        if not container:
            raise ValueError("Can't stream empty container")
        if not isinstance(fl_ctx.get_engine(), StreamableEngine):
            raise RuntimeError(f"engine must be StreamableEngine but got {type(fl_ctx.get_engine())}")
        stream_ctx = stream_ctx if stream_ctx else {}
        stream_ctx[_FLARES.type] = get_class_name(type(container))
        stream_ctx[_FLARES.size] = len(container)
        entries = list(container.items() if isinstance(container, dict) else container)
        numbers = [
            n for n, entry in enumerate(entries) if _is_plain(entry[1] if isinstance(container, dict) else entry)
        ]
        batches = _batches(entries, set(numbers), isinstance(container, dict))

        def fallback(to: Any) -> Any:
            return flare.ContainerStreamer.stream_container(
                channel, topic, stream_ctx, to, container, fl_ctx, entry_timeout, optional, secure
            )

        call = sender.StreamCall(
            fl_ctx,
            channel,
            topic,
            stream_ctx,
            extra={_BATCH_COUNT: len(batches)},
            targets=targets,
            what=f"a container ({type(container).__name__}, {len(container)} entries)",
            timeout=entry_timeout,
            optional=optional,
            secure=secure,
        )

        def make(cell: Any) -> sender.StreamedObject:
            return _StreamedContainer(entries, numbers, batches, isinstance(container, dict), cell)

        code, _ = sender.stream(call, make, fallback)
        return code, code == flare.ReturnCode.OK


def _is_plain(value: Any) -> bool:
    """Whether `value` is a tensor that can be received into memory of its own."""
    return (isinstance(value, np.ndarray) or is_torch(value)) and is_sendable(value)


def _size(value: Any) -> float:
    small = type(value) in _SMALL or isinstance(value, np.number | np.bool_)
    return sys.getsizeof(value) if small else math.inf


def _batches(entries: list[Any], tensors: set[int], keyed: bool) -> list[list[int]]:
    """Put the entries of which something goes with messages into batches, by their numbers."""
    found: list[list[int]] = [[]]
    nbytes = 0.0
    for number, entry in enumerate(entries):
        if number in tensors and not keyed:
            continue
        goes = entry if keyed else (entry,)
        if number in tensors:
            goes = goes[:1]
        size = sum(map(_size, goes))
        if len(found[-1]) == _ROWS or (found[-1] and nbytes + size > _ROW_BYTES):
            found.append([])
            nbytes = 0.0
        found[-1].append(number)
        nbytes += size
    return [batch for batch in found if batch]


class _StreamedContainer(sender.StreamedObject):
    def __init__(
        self,
        entries: list[Any],
        numbers: list[int],
        batches: list[list[int]],
        keyed: bool,
        cell: Any,
    ) -> None:
        self._entries = entries
        self._keyed = keyed
        self._tensors = set(numbers)
        self._batches = batches
        tensors = {str(n): entries[n][1] if keyed else entries[n] for n in numbers}
        ours = shared()
        meters = Meters(cell.get_fqcn(), "container", ours.ledger)
        content = TensorContent(tensors, len(entries), ours.encoded_chunks)  # all entries count, tensors or not
        self.service = Service(content, functools.partial(ours.links.of, cell), meters=meters, notices=ours.notices)

    def more(self) -> Iterator[Any]:
        for batch in self._batches:
            yield [
                [n, self._entries[n][0]]
                if n in self._tensors
                else [n, *(self._entries[n] if self._keyed else [self._entries[n]])]
                for n in batch
            ]


class ContainerReceiving(Receiving):
    """Puts a container together from its tensors and entries."""

    kind = "container"

    def __init__(self, stream_ctx: dict[str, Any], site: str, sender_site: str) -> None:
        size, batches = stream_ctx.get(_FLARES.size), stream_ctx.pop(_BATCH_COUNT, None)
        if type(size) is not int or type(batches) is not int or not 0 <= batches <= size:
            raise ProtocolError(f"a container of {size} entries in {batches} batches can't be received")
        self._container = _new(stream_ctx.get(_FLARES.type))
        self._keyed = isinstance(self._container, MutableMapping)
        self._size = size
        self._changed = threading.Condition()
        self._batches = batches
        #: Number -> [key or value] or [key, value].
        self._rows: dict[int, list[Any]] = {}
        self._heard_at = time.monotonic()

    def take(self, what: Any) -> None:
        """See `Receiving`."""
        if not isinstance(what, list | tuple):
            raise ProtocolError("malformed entries")
        with self._changed:
            for number, *row in what:
                if type(number) is not int or number in self._rows or not 0 <= number < self._size:
                    raise ProtocolError(f"entry {number} of {self._size} comes twice, or is none")
                self._rows[number] = row
            self._batches -= 1
            self._heard_at = time.monotonic()
            self._changed.notify_all()

    def run(
        self,
        links: PeerLinks,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        aborted: Callable[[], bool],
        meter: Meter,
    ) -> None:
        """See `Receiving`."""
        memory = shared().tensor_memory
        tensors = pull(links, peer, ask, in_memory(memory.take), aborted, meter=meter)
        memory.keep_for(tensor.nbytes for tensor in tensors.values())
        self.size = self._size, raw_bytes(tensors)
        with self._changed:
            while self._batches > 0:
                self._changed.wait(_LOOK_SECONDS)
                if aborted():
                    raise AbortedError(f"the container from {peer} was aborted")
                if time.monotonic() - self._heard_at > _WAIT_SECONDS:
                    raise TransferError(f"{peer} sent no entries for {_WAIT_SECONDS:g} s")
        self._fill({int(name): tensor for name, tensor in tensors.items() if name.isdecimal()})

    def _fill(self, tensors: dict[int, Any]) -> None:
        rows, self._rows = self._rows, {}
        try:
            for number in range(self._size):
                row = [*rows.pop(number, ()), *((tensors.pop(number),) if number in tensors else ())]
                if self._keyed:
                    key, value = row
                    self._container[key] = value
                else:
                    (value,) = row
                    self._add(value)
        except (ValueError, TypeError) as error:
            raise ProtocolError(
                f"entry {number} can't be added to a {type(self._container).__name__}: {error}"
            ) from error
        if rows or tensors or len(self._container) != self._size:
            raise ProtocolError(f"container size {len(self._container)} does not match expected size {self._size}")

    def _add(self, value: Any) -> None:
        self._container.add(value) if isinstance(self._container, MutableSet) else self._container.append(value)

    def may_fall_back(self, error: Exception) -> bool:
        """See `Receiving`. The fallback needs none of what fails here."""
        return isinstance(error, RdmaError) and not isinstance(error, AbortedError | ProtocolError)

    def finish(self, stream_ctx: dict[str, Any]) -> None:
        """See `Receiving`."""
        stream_ctx[_FLARES.result] = self._container


def _new(name: Any) -> Any:
    """An empty container of a class that the sender names, as with FLARE's, but of no other class."""
    try:
        found = load_class(name)
    except Exception as error:  # whatever a name leads to
        raise ProtocolError(f"container class {name!r} can't be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, MutableMapping | MutableSequence | MutableSet)):
        raise ProtocolError(f"{name!r} is no container class")
    return found()


class ContainerRetriever(flare_retriever.ContainerRetriever):
    """Gets a container from another site, which has `add_container`-ed it; as FLARE's."""

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    def register_stream_processing(
        self, channel: str, topic: str, fl_ctx: FLContext, stream_done_cb: Any, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        ContainerStreamer.register_stream_processing(fl_ctx, channel, topic, stream_done_cb, **cb_kwargs)

    def do_stream(
        self, target: str, request: Shareable, fl_ctx: FLContext, stream_ctx: Any, validated_data: Any
    ) -> Any:
        """See FLARE's."""
        return ContainerStreamer.stream_container(
            channel=self.stream_channel,
            topic=self.topic,
            stream_ctx=stream_ctx,
            targets=[target],
            container=validated_data,
            fl_ctx=fl_ctx,
            entry_timeout=self.entry_timeout,
            optional=self.stream_msg_optional,
            secure=self.stream_msg_secure,
        )
