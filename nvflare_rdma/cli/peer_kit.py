"""Who this side is in a live check: its start-up kit, the certificates in it, and the settings that count."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from nvflare_rdma.cli.doctor import settings_of
from nvflare_rdma.cli.enable import kit_of
from nvflare_rdma.cli.kit_certificates import certificate_in, credentials_in
from nvflare_rdma.runtime import Runtime, runtime_of
from nvflare_rdma.settings import Settings


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
    kit = None if folder is None else kit_of(folder)
    name, credentials = "", dict[str, str]()
    if kit is not None and (credentials := credentials_in(kit.folder / "startup")):
        name, _ = certificate_in(kit.folder / "startup")
    settings = settings_of(kit.folder if kit is not None else None)
    ports = tuple(sorted(port for port in kit.ports if port)) if kit is not None else ()
    return Side(name, settings, runtime_of(settings), ports, kit is not None and kit.role == "server", credentials)
