"""What left for one receiver of a file that is encoded on its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import xxhash

from nvflare_rdma.codecs import EXACT
from nvflare_rdma.transfer.files.parts import FilePart
from nvflare_rdma.transfer.files.source import OpenFile
from nvflare_rdma.transfer.manifest import Item
from nvflare_rdma.transfer.receipt import Receipt, largest


def receipt_of(file: OpenFile, parts: Mapping[str, FilePart], items: Iterable[Item]) -> Receipt | None:
    """The receipt of a receiver that has got these items; None if the file travels as it is. A tensor counts as encoded
    if any part of it is. What an earlier transfer had brought is in it, too."""
    if file.identity.codec is None:
        return None
    codecs = dict.fromkeys((tensor.name for tensor in file.tensors), EXACT)
    errors, whole, known = [], xxhash.xxh3_128(file.identity.name.encode()), True
    for item in items:
        part = parts[item.name]
        # What an earlier transfer had brought may have turned out to be exact after the items were described.
        cut = None if part.unrepresentable else item.cut
        codec = EXACT if cut is None else cut.codec.name
        if cut is not None:
            codecs[part.tensor] = codec
            errors.append((codec, part.error))
        digest = part.source(cut is None).digests.whole()
        known = known and digest is not None
        whole.update(f"\0{part.tensor}\0{item.dtype}\0{item.nbytes}\0{codec}\0".encode() + (digest or b""))
    counts = Counter(sorted(codecs.values(), key=lambda name: name == EXACT))
    return Receipt(dict(counts), largest(errors), whole.hexdigest() if known else "", file.identity.name)
