"""Encoded tensors in FLARE's messages: what is sent where there is no direct way for tensors that are to be encoded.

FLARE's `download_object` asks for one piece after the other, and relays the answers. The receiver lets the sender know
beforehand ("relay", see `transfer.service`), so that a receiver without this package still gets what FLARE would send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvflare.fuel.f3.streaming.download_service import Consumer, ProduceRC

from nvflare_rdma.errors import ProtocolError, RdmaError
from nvflare_rdma.transfer import Item, Land, Place, Relayed, give, store_chunk

RELAY_KEY = "nvflare_rdma_relay"
PIECE_BYTES = 2 << 20  # as much as FLARE sends at once


def produce(relayed: Relayed, state: Mapping[str, Any] | None) -> tuple[str, Any, dict[str, Any]]:
    """The sender's answer to FLARE's request: the piece that follows the one that `state` names."""
    number, offset, exact = (state or {}).get(RELAY_KEY) or (0, 0, False)
    piece = relayed.piece(int(number), int(offset), bool(exact), PIECE_BYTES)
    if piece is None:
        return ProduceRC.EOF, None, {}
    number, offset, exact, data = piece
    # FLARE takes the length of each in the list.
    return ProduceRC.OK, [data], {RELAY_KEY: [number, offset + len(data), exact]}


class RelayConsumer(Consumer):
    """Receives the pieces and puts them where `land` says.

    Attributes:
        result: what the places gave, by name; None until the download is over, and if it failed.
        error: why it failed; None if it did not.
        nbytes: how many bytes have arrived, in pieces and in the manifest.
    """

    def __init__(self, items: list[Item], land: Land) -> None:
        super().__init__()
        self.error: str | None = None
        self.result: dict[str, Any] | None = None
        self.nbytes = sum(len(item.content or b"") for item in items)
        self._items = list(items)
        self._land_item = land
        self._places: list[Place] = [land(item) for item in items]
        self._at = (0, 0)

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """FLARE's hook: one answer of the sender."""
        match state.get(RELAY_KEY), data:
            case [int(number), int(end), bool(exact)], [bytes() | bytearray() | memoryview() as piece]:
                self._land(number, end - len(piece), exact, memoryview(piece).cast("B"))
            case _:
                raise ProtocolError("malformed piece of a tensor")
        return state

    def _land(self, number: int, offset: int, exact: bool, piece: memoryview) -> None:
        self._skip_empty()
        if exact and self._at[0] == number < len(self._items) and self._items[number].cut is not None:
            # What its codec can't carry shows in the middle of it.
            self._items[number] = replace(self._items[number], cut=None)
            self._places[number] = self._land_item(self._items[number])
            self._at = number, 0
        if (number, offset) != self._at or not piece:
            raise ProtocolError(f"a piece of tensor {number} at {offset} came where {self._at} was expected")
        item = self._items[number]
        nbytes, unit = item.sent_nbytes, item.unit
        end = offset + len(piece)
        if end > nbytes or (len(piece) % unit and end != nbytes):
            raise ProtocolError(f"{len(piece)} bytes at {offset} of a tensor of {nbytes}")
        store_chunk(item, self._places[number], offset, piece)
        self.nbytes += len(piece)
        self._at = (number, end) if end < nbytes else (number + 1, 0)

    def _skip_empty(self) -> None:
        """Go on to the next tensor that has pieces: the others have no bytes, or are in the manifest."""
        number, offset = self._at
        while number < len(self._items) and self._items[number].content is not None:
            number, offset = number + 1, 0
        self._at = number, offset

    def download_completed(self, ref_id: str) -> None:
        """FLARE's hook: the sender has nothing more."""
        self._skip_empty()
        if self._at[0] != len(self._items):
            self.error = f"tensor {self._at[0]} of {len(self._items)} did not come whole"
            return
        try:
            for item, place in zip(self._items, self._places, strict=True):
                if item.content is not None:
                    store_chunk(item, place, 0, memoryview(item.content))
            self.result = {item.name: give(item, place) for item, place in zip(self._items, self._places, strict=True)}
        except (RdmaError, OSError) as error:
            self.error = str(error)

    def download_failed(self, ref_id: str, reason: str) -> None:
        """FLARE's hook: the download has failed."""
        self.error, self.result = reason, None
