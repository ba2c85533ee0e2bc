"""Certificates as FLARE's provisioning makes them, from a throw-away authority."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
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

    def _for_cells(self, like: x509.Certificate, uris: Sequence[str]) -> x509.Certificate:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        made = x509.CertificateBuilder(
            *(like.issuer, like.subject, like.public_key(), like.serial_number),
            *(like.not_valid_before_utc.replace(tzinfo=None), like.not_valid_after_utc.replace(tzinfo=None)),
        )
        return made.add_extension(names, critical=False).sign(self._key, hashes.SHA256())

    @staticmethod
    def _write(folder: Path, name: str, data: bytes) -> str:
        path = folder / name
        path.write_bytes(data)
        os.chmod(path, 0o600)
        return str(path)

    def issue(self, role: str, common_name: str, cells: Sequence[str] = (), age: int = 0) -> dict[str, str]:
        """FLARE's connection parameters for a participant of ``role`` (``server`` or ``client``). ``cells``: for those
        only, as FLARE 2.10 issues a certificate for each job. It is valid for 360 days from ``age`` days ago on."""
        key, public = generate_keys()
        since = datetime.now(UTC) - timedelta(days=age)
        identity = Identity(common_name, "org", role)
        certificate = generate_cert(identity, self._identity, self._key, public, not_valid_before=since)
        if cells:
            certificate = self._for_cells(certificate, [f"https://nvidia.com/nvflare/v1/{cell}" for cell in cells])
        # FLARE takes other roles' files that lie beside these.
        folder = self._folder / f"{role}-{common_name}-{len(os.listdir(self._folder))}"
        folder.mkdir(exist_ok=True)
        return {
            "ca_cert": self._write(folder, "rootCA.pem", self._root),
            f"{role}_cert": self._write(folder, f"{role}.crt", serialize_cert(certificate)),
            f"{role}_key": self._write(folder, f"{role}.key", serialize_pri_key(key)),
        }
