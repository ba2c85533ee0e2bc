"""What left for one receiver, as an officer of security asks for it: codecs, the relative error, and a digest."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from nvflare_rdma.codecs import EXACT, LOSSLESS, RelativeError, codec_of, codes_in, is_torch, piece_notes
from nvflare_rdma.transfer.arrays import to_bytes
from nvflare_rdma.transfer.manifest import Item

_RUN = 1 << 22


@dataclass(frozen=True)
class Receipt:
    """Tells what left for one receiver that has everything.

    Attributes:
        codecs: how many tensors left in each codec, and how many exact. Codes count as the tensor that they stand for,
            and scales and tables of codes as exact ones.
        error: the largest relative error of a tensor (`nvflare_rdma.codecs.fidelity`); None if none was encoded with
            loss, or if none is known.
        digest: xxh3, 128 bits, of all that left, in hexadecimal digits; "" if that is not known. It tells messages
            apart, and is no signature.
        file: the name of the file that left; "" if it was none.
    """

    codecs: Mapping[str, int]
    error: RelativeError | None
    digest: str
    file: str = ""

    def as_fields(self) -> dict[str, Any]:
        """The fields of a record (`nvflare_rdma.transfer.records.TransferRecord`) that say this."""
        error = self.error
        return {
            "codecs": ", ".join(f"{count} {name}" for name, count in self.codecs.items()),
            "relative_error": None if error is None else min(error.value, sys.float_info.max),  # JSON has no infinity
            "error_from": "" if error is None else "sample" if error.estimated else "whole",
            "digest": self.digest,
        }

    def __str__(self) -> str:
        codecs = ", ".join(
            f"{count} in {name}" if name != EXACT else f"{count} exact" for name, count in self.codecs.items()
        )
        lossless = all(name in (EXACT, *LOSSLESS) for name in self.codecs)
        unknown = "nothing lost" if lossless else "relative error not known"
        error = f"relative error at most {self.error}" if self.error is not None else unknown
        return f"{codecs}; {error}; digest {self.digest or 'not known'}"


class Receipts:
    """Makes the receipts of one message.

    Digests of what travels as it is are taken once, before it leaves; those of what is encoded on its way are noted
    piece by piece, while it is in the processor's cache. A message of which nothing is encoded has no receipt: its
    bytes would have to be read once more for that.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """`tensors` are the message's, by item name. They are not kept."""
        self.wanted = any(codec_of(each) is not None or codes_in(each) is not None for each in tensors.values())
        self._digests: dict[str, bytes] = {}

    def prepare(self, items: Iterable[Item], tensors: Mapping[str, Any]) -> None:
        """Take the digests of the items that are about to travel as they are."""
        if self.wanted:
            for item in items:
                if item.cut is None and item.name not in self._digests:
                    self._digests[item.name] = _digest_of(tensors[item.name])

    def make(self, items: Iterable[Item] | None, tensors: Mapping[str, Any]) -> Receipt | None:
        """The receipt of a receiver that has got these items; or, if that is None, the tensors as FLARE sends them."""
        if not self.wanted:
            return None
        if items is None:
            return self._as_they_are(tensors)
        codecs: Counter[str] = Counter()
        errors: list[tuple[str, RelativeError | None]] = []
        whole, known = xxhash.xxh3_128(), True
        for item in items:
            tensor = tensors[item.name]
            if item.cut is not None:
                codec, error = item.cut.codec.name, piece_notes(tensor).error(item.cut.count)
                digest = piece_notes(tensor).digest(item.cut.count)
            else:
                codes = codes_in(tensor)
                codec, error = (codes.codec, codes.error) if codes is not None else (EXACT, None)
                digest = self._digests.get(item.name)
            codecs[codec] += 1
            errors.append((codec, error))
            known = known and digest is not None
            whole.update(f"{item.name}\0{item.dtype}\0{item.shape}\0{codec}\0".encode() + (digest or b""))
        return Receipt(dict(codecs), largest(errors), whole.hexdigest() if known else "")

    @staticmethod
    def _as_they_are(tensors: Mapping[str, Any]) -> Receipt:
        found = [codes_in(tensor) for tensor in tensors.values()]
        codecs = Counter(EXACT if codes is None else codes.codec for codes in found)
        return Receipt(dict(codecs), largest([(each.codec, each.error) for each in found if each is not None]), "")


def largest(errors: Iterable[tuple[str, RelativeError | None]]) -> RelativeError | None:
    """The largest of the relative errors that codecs have made, those without loss left out."""
    found = [error for codec, error in errors if error is not None and codec not in LOSSLESS]
    if not found:
        return None
    return RelativeError(max(error.value for error in found), any(error.estimated for error in found))


def _digest_of(tensor: Any) -> bytes:
    """The digest of a tensor's bytes, which come to the CPU some at a time if they are elsewhere."""
    found = xxhash.xxh3_128()
    if is_torch(tensor) and not tensor.is_cpu:
        flat = tensor.detach().reshape(-1)
        for start in range(0, math.prod(tensor.shape), _RUN):
            found.update(to_bytes(flat[start : start + _RUN]))
    else:
        found.update(to_bytes(tensor))
    return found.digest()
