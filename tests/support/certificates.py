"""Certificates as FLARE's provisioning makes them, from a throw-away authority."""

from __future__ import annotations

import os
from pathlib import Path

from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert, serialize_pri_key


class Authority:
    """A project's root certificate; issues its participants' certificates, each into a folder of its own."""

    def __init__(self, folder: Path, name: str = "test-project") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._identity = Identity(name, "org")
        self._key, public = generate_keys()
        self._root = serialize_cert(generate_cert(self._identity, self._identity, self._key, public, ca=True))
        self.root = self._write(folder, "rootCA.pem", self._root)

    @staticmethod
    def _write(folder: Path, name: str, data: bytes) -> str:
        path = folder / name
        path.write_bytes(data)
        os.chmod(path, 0o600)
        return str(path)

    def issue(self, role: str, common_name: str) -> dict[str, str]:
        """FLARE's connection parameters for a participant of ``role`` (``server`` or ``client``)."""
        key, public = generate_keys()
        certificate = generate_cert(Identity(common_name, "org", role), self._identity, self._key, public)
        folder = self._folder / f"{role}-{common_name}"  # FLARE takes other roles' files that lie beside these
        folder.mkdir(exist_ok=True)
        return {
            "ca_cert": self._write(folder, "rootCA.pem", self._root),
            f"{role}_cert": self._write(folder, f"{role}.crt", serialize_cert(certificate)),
            f"{role}_key": self._write(folder, f"{role}.key", serialize_pri_key(key)),
        }
