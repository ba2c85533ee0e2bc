"""Messages that are made, and consumed, chunk by chunk."""

from __future__ import annotations

import threading

import numpy as np

from nvflare_rdma.channel.bodies import Sink, Source, Take
from nvflare_rdma.errors import CodecError

MASK = 0x5A


def masked(chunk: memoryview) -> memoryview:
    """Another chunk of the same length; twice gives the first again."""
    return (np.frombuffer(chunk, np.uint8) ^ MASK).data


class MaskedSource(Source):
    """Each chunk is made when it is written; it must begin at a multiple of ``unit``."""

    ready = False

    def __init__(self, message: memoryview, unit: int) -> None:
        self.nbytes = len(message)
        self._message = message
        self._unit = unit

    def read(self, offset: int, length: int, take: Take) -> memoryview:
        assert offset % self._unit == 0
        return masked(self._message[offset : offset + length])


class TestSink(Sink):
    """Lands in ``memory`` directly, or is unmasked into it chunk by chunk; ``reason`` is None until it has ended."""

    __test__ = False

    def __init__(self, nbytes: int, unit: int = 0, spoiled: bool = False) -> None:
        self.nbytes = nbytes
        self.memory = np.zeros(nbytes, np.uint8).data
        self.ended = threading.Event()
        self.reason: str | None = None
        self._in_place = not unit
        self._spoiled = spoiled
        if unit:
            self.unit = unit

    @property
    def buffer(self) -> memoryview | None:
        return self.memory if self._in_place else None

    def put(self, offset: int, chunk: memoryview) -> None:
        assert offset % self.unit == 0
        if self._spoiled:
            raise CodecError("these are no codes")
        self.memory[offset : offset + len(chunk)] = masked(chunk)

    def done(self) -> None:
        self.reason = ""
        self.ended.set()

    def failed(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()
