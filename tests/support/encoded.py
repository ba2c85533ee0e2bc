"""What a codec makes of values, as a transfer applies it. Nothing here needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.transfer.pieces import PieceLayout


def as_encoded(tensor: Any, codec: str) -> np.ndarray:
    """What arrives of a tensor: its pieces decoded, flat."""
    flat, made = to_flat(tensor), get_codec(codec)
    cut, out = PieceLayout.choose(made, flat.size), np.empty_like(flat)
    for first in range(0, flat.size, cut.values):
        piece = flat[first : first + cut.values]
        encoded = np.empty(made.encoded_nbytes(piece.size), np.uint8)
        made.encode_into(piece, encoded)
        made.decode_into(encoded, out[first : first + cut.values])
    return out
