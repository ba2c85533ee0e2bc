"""What is noted of tensors: that they are to be encoded when they are sent and not before, that they are codes, or that
they came encoded.

A note belongs to one Python object, which is why `marked` makes a new one (a view of the same memory): the same weights
may also be sent somewhere else as they are.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nvflare_rdma.codecs.base import FixedSizeCodec
from nvflare_rdma.codecs.fidelity import PieceNotes, RelativeError
from nvflare_rdma.codecs.tensors import is_torch

Note = TypeVar("Note")


class _Notes(Generic[Note]):
    """Notes of tensors, for as long as these live. Tensors can't be keys: they are compared value by value."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die in any allocation, also in one under the lock
        self._entries: dict[int, tuple[Any, Note]] = {}

    def add(self, tensor: Any, note: Note) -> None:
        key = id(tensor)

        def forget(_: Any) -> None:
            with self._lock:
                self._entries.pop(key, None)

        with self._lock:
            self._entries[key] = weakref.ref(tensor, forget), note

    def find(self, tensor: Any) -> Note | None:
        with self._lock:
            entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None


@dataclass(frozen=True, slots=True)
class Codes:
    """What is noted of codes: the codec that made them, and the relative error of the tensor that they stand for."""

    codec: str
    error: RelativeError


_marks: _Notes[tuple[FixedSizeCodec, PieceNotes]] = _Notes()
_codes: _Notes[Codes] = _Notes()
_decoded: _Notes[bool] = _Notes()


def marked(tensor: Any, codec: FixedSizeCodec, pieces: PieceNotes | None = None) -> Any:
    """Return a view of `tensor` (numpy or torch, encodable) that `codec_of` and `piece_notes` know."""
    view = tensor.detach() if is_torch(tensor) else tensor.view()
    _marks.add(view, (codec, pieces or PieceNotes()))
    return view


def codec_of(tensor: Any) -> FixedSizeCodec | None:
    """Return the codec that `tensor` is to be encoded with, or None if it is not marked."""
    found = _marks.find(tensor)
    return found[0] if found is not None else None


def piece_notes(tensor: Any) -> PieceNotes:
    """Return what is known of the encoded pieces of a marked tensor; of another one, a new object."""
    found = _marks.find(tensor)
    return found[1] if found is not None else PieceNotes()


def note_codes(tensor: Any, codes: Codes) -> None:
    """Note what the codes in `tensor` stand for."""
    _codes.add(tensor, codes)


def codes_in(tensor: Any) -> Codes | None:
    """Return what `note_codes` was told of this tensor."""
    return _codes.find(tensor)


def note_decoded(tensor: Any) -> None:
    """Note that `tensor` came encoded, and was decoded as it came."""
    _decoded.add(tensor, True)


def was_decoded(tensor: Any) -> bool:
    """Return whether `note_decoded` was told of this tensor."""
    return _decoded.find(tensor) is not None
