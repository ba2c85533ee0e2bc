"""What one side of a link allows itself and its peer."""

from __future__ import annotations

from dataclasses import dataclass

from nvflare_rdma.errors import LocalProtocolError

MAX_INLINE_BYTES = 64 * 1024
MIN_CHUNK_BYTES = 64 * 1024
MAX_CHUNK_BYTES = 64 * 1024 * 1024
MAX_UNIT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    """Bounds of one link. Sizes are in bytes, times in seconds.

    `max_writes` and `peer_chunk_bytes` bound what a peer may ask of this side as a sender: grants open at once,
    and the smallest chunk that is not a message's last. A message that is being received must come at
    `min_bytes_per_second` at any time after its first `stall_timeout`, or its memory would be lost to others for as
    long as the peer likes. The connection is given up when more than `max_damaged` chunks in a row fail their check.
    """

    max_message_bytes: int
    inline_bytes: int = MAX_INLINE_BYTES
    max_incoming: int = 4096
    max_writes: int = 1024
    peer_chunk_bytes: int = MIN_CHUNK_BYTES
    max_damaged: int = 16
    handshake_timeout: float = 30.0
    stall_timeout: float = 120.0
    min_bytes_per_second: int = 16 * 1024


def whole_units(nbytes: int, unit: int) -> int:
    """The multiple of `unit` that is not above `nbytes`, but one unit at least."""
    return max(nbytes - nbytes % unit, unit)


def check_unit(unit: int) -> None:
    """Raise LocalProtocolError if chunks can't be cut at multiples of `unit`."""
    if unit != 1 and not MIN_CHUNK_BYTES <= unit <= MAX_UNIT_BYTES:
        raise LocalProtocolError(f"a unit is 1 or {MIN_CHUNK_BYTES} to {MAX_UNIT_BYTES} bytes, not {unit}")
