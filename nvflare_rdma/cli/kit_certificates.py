"""The certificates in a start-up kit: whose they are, and whether they can be used today."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from nvflare_rdma.cli.output import ENVIRONMENT, CommandError

_OWN = ("server_cert", "client_cert")
_WHOLE = "take the kit as FLARE has made it"
_RENEW = "issue a new one (`nvflare provision`), or set this host's clock right"


def credentials_in(startup: Path) -> dict[str, str]:
    """FLARE's parameters for the files in a kit's folder `startup`; {} if it has none.

    Raises:
        CommandError: one is missing or can't be read.
    """
    if not (root := startup / "rootCA.pem").is_file():
        return {}
    role = "server" if (startup / "server.crt").is_file() else "client"
    files = {"ca_cert": root, f"{role}_cert": startup / f"{role}.crt", f"{role}_key": startup / f"{role}.key"}
    for path in files.values():
        try:
            path.read_bytes()
        except FileNotFoundError as error:
            raise CommandError("NO_CERTIFICATE", f"{path} is not there", _WHOLE) from error
        except OSError as error:
            text = f"{path} can't be read: {error.strerror}"
            raise CommandError("NO_CERTIFICATE", text, "run this as whoever owns the kit", ENVIRONMENT) from error
    return {key: str(path) for key, path in files.items()}


def certificate_in(startup: Path) -> tuple[str, datetime]:
    """The name in the certificate of a kit's folder `startup`, and until when it is valid.

    Raises:
        CommandError: a file is missing or can't be read, is no certificate, or the certificate is of another time.
    """
    side = credentials_in(startup)
    ((certificate, key),) = [(side[name], side[name.replace("_cert", "_key")]) for name in side if name in _OWN]
    name, until = _check_dates(Path(certificate))
    try:
        context = ssl.create_default_context(cafile=side["ca_cert"])
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise CommandError("NO_CERTIFICATE", f"the certificates in {startup} can't be used: {error}", _WHOLE) from error
    return name, until


def _check_dates(path: Path) -> tuple[str, datetime]:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if names else ""
    except ValueError as error:
        raise CommandError("NO_CERTIFICATE", f"{path} is no certificate: {error}", _WHOLE) from error
    now, whose = datetime.now(UTC), f"{path}, the certificate of {name!r},"
    if now > certificate.not_valid_after_utc:
        text = f"{whose} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: no peer takes it"
        raise CommandError("CERTIFICATE_EXPIRED", text, _RENEW)
    if now < certificate.not_valid_before_utc:
        text = f"{whose} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: no peer takes it"
        raise CommandError("CERTIFICATE_NOT_YET_VALID", text, _RENEW)
    return name, certificate.not_valid_after_utc
