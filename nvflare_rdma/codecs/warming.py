"""Codecs' compiled code, loaded before it is needed: the first use of a codec in a process takes seconds otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from nvflare_rdma.codecs.base import Codec, FixedSizeCodec
from nvflare_rdma.codecs.fidelity import squares_of


def warm_up(codecs: Iterable[Codec]) -> threading.Thread:
    """Use each codec once in a new thread, so that its compiled code is loaded, and return the thread."""
    each = {codec.name: codec for codec in codecs}

    def use() -> None:
        values = np.zeros(4096, np.float32)
        for codec in each.values():
            encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
            codec.decode_into(encoded[: codec.encode_into(values, encoded)], values)
            if isinstance(codec, FixedSizeCodec):
                codec.add_into(encoded, 1.0, values)
        squares_of(values, values)

    thread = threading.Thread(target=use, name="rdma-codecs", daemon=True)
    thread.start()
    return thread
