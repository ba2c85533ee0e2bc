"""Who this side is in a live check: its start-up kit, the certificates in it, and the settings that count."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from nvflare_rdma.cli.doctor import read_settings
from nvflare_rdma.cli.enable import told
from nvflare_rdma.cli.output import CommandError
from nvflare_rdma.kits import Kit, find_kits
from nvflare_rdma.runtime import Runtime, runtime_of
from nvflare_rdma.settings import Settings

_WHOLE = "take the kit as FLARE has made it"
_RENEW = "issue a new one (`nvflare provision`), or set this host's clock right"


@dataclass(frozen=True)
class Side:
    """This side of a live check.

    Attributes:
        name: what its certificate calls it; "" without one.
        settings: those of its kit, or of the environment.
        runtime: made of them.
        ports: FLARE's own, of a server's kit.
        server: whether the kit is a server's.
        credentials: FLARE's parameters for TLS; empty without certificates: then nothing is encrypted.
    """

    name: str
    settings: Settings
    runtime: Runtime
    ports: tuple[int, ...] = ()
    server: bool = False
    credentials: dict[str, str] = field(default_factory=dict)

    @property
    def secure(self) -> bool:
        """Whether there are certificates: then both sides have to show one."""
        return bool(self.credentials)

    def tls(self, server_side: bool) -> ssl.SSLContext | None:
        """A context for mutual TLS, as links have it (`nvflare_rdma.streaming`); None without certificates."""
        if not self.credentials:
            return None
        from nvflare.fuel.f3.drivers.driver_params import DriverParams
        from nvflare.fuel.f3.drivers.net_utils import get_ssl_context

        return cast(ssl.SSLContext, get_ssl_context({**self.credentials, DriverParams.SECURE.value: True}, server_side))


def this_side(folder: Path | None) -> Side:
    """Look into the kit in `folder`; None for no kit.

    Raises:
        CommandError: it is no kit, its certificates can't be used, or a setting is wrong.
    """
    kit = None
    if folder is not None:
        with told():
            kits = find_kits(folder)
        if len(kits) > 1:
            names = ", ".join(each.name for each in kits)
            raise CommandError("NO_KIT", f"{folder} has several kits: {names}", "name the folder of one of them")
        (kit,) = kits
    name, credentials = _certificates(kit) if kit is not None else ("", {})
    settings, _, problems = read_settings(kit.folder if kit is not None else None)
    if problems:
        raise CommandError("INVALID_INPUT", problems[0], "`nvflare-rdma doctor` shows what is set")
    ports = tuple(sorted(port for port in kit.ports if port)) if kit is not None else ()
    return Side(name, settings, runtime_of(settings), ports, kit is not None and kit.role == "server", credentials)


def _certificates(kit: Kit) -> tuple[str, dict[str, str]]:
    """The name in a kit's certificate, and FLARE's parameters; "" and {} if the kit has none."""
    startup = kit.folder / "startup"
    if not (root := startup / "rootCA.pem").is_file():
        return "", {}
    role = "server" if (startup / "server.crt").is_file() else "client"
    files = {"ca_cert": root, f"{role}_cert": startup / f"{role}.crt", f"{role}_key": startup / f"{role}.key"}
    for path in files.values():
        try:
            path.read_bytes()
        except OSError as error:
            hint = _WHOLE if isinstance(error, FileNotFoundError) else "run this as whoever owns the kit"
            raise CommandError("NO_CERTIFICATE", f"{path} can't be read: {error.strerror}", hint) from error
    name = _check_dates(files[f"{role}_cert"])
    side = {key: str(path) for key, path in files.items()}
    try:
        context = ssl.create_default_context(cafile=root)
        context.load_cert_chain(side[f"{role}_cert"], side[f"{role}_key"])
    except (ssl.SSLError, OSError) as error:
        raise CommandError("NO_CERTIFICATE", f"the certificates in {startup} can't be used: {error}", _WHOLE) from error
    return name, side


def _check_dates(path: Path) -> str:
    """The name in a certificate of today.

    Raises:
        CommandError: it is none, or is of another time.
    """
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
    return name
