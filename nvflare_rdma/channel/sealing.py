"""Authenticated encryption of chunks (AES-256-GCM, NIST SP 800-38D).

Each side seals what it sends with a key of its own, given to the peer over the TLS control stream when the
connection opens. A nonce is ``transfer (u64) | chunk index (u32)``: transfers are numbered by a counter and
each chunk is written once, so no nonce repeats under one key. The nonce is also the associated data, so a
chunk can't be passed off as another one.
"""

from __future__ import annotations

import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nvflare_rdma.errors import IntegrityError

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE = struct.Struct("!QI")


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


class Sealer:
    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def seal_into(self, transfer: int, index: int, plain: memoryview, out: memoryview) -> None:
        """Write ciphertext and tag to ``out``, which is `TAG_BYTES` longer than ``plain``."""
        nonce = _NONCE.pack(transfer, index)
        self._aead.encrypt_into(nonce, plain, nonce, out)

    def open_into(self, transfer: int, index: int, sealed: memoryview, out: memoryview) -> None:
        """Write the plaintext to ``out``.

        Raises:
            IntegrityError: the chunk was changed on its way, or is not this chunk.
        """
        nonce = _NONCE.pack(transfer, index)
        try:
            self._aead.decrypt_into(nonce, sealed, nonce, out)
        except InvalidTag:
            raise IntegrityError(
                f"chunk {index} of transfer {transfer} ({len(out)} bytes) does not match its seal: "
                "it was altered on the way"
            ) from None
