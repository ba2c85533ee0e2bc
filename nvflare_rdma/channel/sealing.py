"""What guards a chunk on its way: a seal in secure mode, else a checksum.

Seals are AES-256-GCM (NIST SP 800-38D). Each side draws a key for what it sends and gives it to the peer over the TLS
control stream when the connection opens. What seals is derived from it (HKDF, RFC 5869), from the ticket that opened
the door, and from the TLS handshake as each end has seen it, with both certificates (`ControlStream.binding`). So who
sits in between and speaks TLS with each end can open nothing, whatever keys it passes on. A nonce is
`transfer (u64) | notification (u32)`: transfers are numbered by a counter, and every grant has a higher notification
than the last, so no nonce repeats under one key, also when a chunk is sent again. Transfer, offset and length are the
associated data, so a chunk can't be passed off as another one.

The checksum is XXH3 (64 bits): it finds flipped bits, not attackers.
"""

from __future__ import annotations

import os
import struct

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nvflare_rdma.errors import IntegrityError

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE = struct.Struct("!QI")
_IDENTITY = struct.Struct("!QQQ")


def new_key() -> bytes:
    """A random key, from which a `Sealer`'s is derived."""
    return os.urandom(KEY_BYTES)


def derive_key(key: bytes, ticket: bytes, binding: bytes) -> bytes:
    """The key for a `Sealer`; for `ticket` and `binding` see `ControlStream`."""
    return HKDF(SHA256(), KEY_BYTES, salt=ticket, info=b"nvflare-rdma seal" + binding).derive(key)


def checksum(chunk: memoryview) -> int:
    """64 bits that a changed `chunk` is very unlikely to have as well."""
    return xxhash.xxh3_64_intdigest(chunk)


class Sealer:
    """Seals and opens chunks with one key, see the top of this module."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def seal_into(self, transfer: int, offset: int, notification: int, plain: memoryview, out: memoryview) -> None:
        """Write ciphertext and tag to `out`, which is `TAG_BYTES` longer than `plain`."""
        identity = _IDENTITY.pack(transfer, offset, len(plain))
        self._aead.encrypt_into(_NONCE.pack(transfer, notification), plain, identity, out)

    def open_into(self, transfer: int, offset: int, notification: int, sealed: memoryview, out: memoryview) -> None:
        """Write the plaintext to `out`.

        Raises:
            IntegrityError: the chunk was changed on its way, or is not this chunk.
        """
        identity = _IDENTITY.pack(transfer, offset, len(out))
        try:
            self._aead.decrypt_into(_NONCE.pack(transfer, notification), sealed, identity, out)
        except InvalidTag:
            raise IntegrityError(
                f"{len(out)} bytes at {offset} of transfer {transfer} do not match their seal: "
                "they were altered on the way"
            ) from None
