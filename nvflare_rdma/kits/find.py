"""Which start-up kits there are in a folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.kits.errors import KitError

SERVER, CLIENT, RELAY, ADMIN = "server", "client", "relay", "admin"
_ROLES = {"fed_server.json": SERVER, "fed_client.json": CLIENT, "fed_relay.json": RELAY, "fed_admin.json": ADMIN}
_STARTUP, _LOCAL = "startup", "local"
_SIGNATURE = "signature.json"
_WHAT = "name a POC workspace, a start-up kit (a folder with startup and local), or what `nvflare deploy prepare` made"


@dataclass(frozen=True)
class Kit:
    """A start-up kit.

    Attributes:
        folder: it has startup and local in it.
        role: what starts from it: `SERVER`, `CLIENT`, `RELAY` or `ADMIN`.
        name: of the site, as in its start-up configuration.
        scheme: what it speaks with the server, or as one ("tcp", "grpc", "http"); "" if that is not told.
        ports: those that a server has as FLARE's.
    """

    folder: Path
    role: str
    name: str
    scheme: str
    ports: frozenset[int] = frozenset()

    @property
    def local(self) -> Path:
        """The folder with what an operator may change."""
        return self.folder / _LOCAL

    @property
    def signed(self) -> Path | None:
        """The file with the signatures of `local`, if it is signed: where sites encrypt homomorphically, or run in
        confidential virtual machines."""
        file = self.local / _SIGNATURE
        return file if file.exists() else None


def find_kits(target: Path) -> list[Kit]:
    """The kits that `target` stands for: it is one, or a folder of them, or a workspace of `nvflare poc prepare` or
    `nvflare provision`, of which the newest kits (`prod_NN`) count.

    Raises:
        KitError: there are none, one of them is not whole, or they can't be read.
    """
    try:
        return _find(target)
    except OSError as error:
        raise KitError(
            "NO_ACCESS", f"{error.filename or target} can't be read: {error.strerror}", "run this as whoever owns it"
        ) from error


def _find(target: Path) -> list[Kit]:
    if not target.exists():
        raise KitError("NO_SUCH_TARGET", f"{target} does not exist", _WHAT)
    if not target.is_dir():
        raise KitError("NO_KIT", f"{target} is a file and no folder", _WHAT)
    if kit := _kit(target):
        return [kit]
    if kits := _kits_in(target):
        return kits
    made = [found for folder in (target, *_folders(target)) if (found := _newest(folder))]
    if len(made) > 1:
        several = ", ".join(str(each) for each in made)
        raise KitError("NO_KIT", f"{target} has kits of several projects: {several}", "name one of these folders")
    if made and (kits := _kits_in(made[0])):
        return kits
    raise KitError("NO_KIT", f"{target} has no start-up kits, nor has a prod_NN folder below it", _WHAT)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _newest(folder: Path) -> Path | None:
    """What FLARE has made last of the kits of one project."""
    found = {int(match[1]): path for path in _folders(folder) if (match := re.fullmatch(r"prod_(\d+)", path.name))}
    return found[max(found)] if found else None


def _kits_in(folder: Path) -> list[Kit]:
    return [kit for path in _folders(folder) if (kit := _kit(path))]


def _kit(folder: Path) -> Kit | None:
    """The kit that a folder is; None if it is none."""
    have = [name for name in (_STARTUP, _LOCAL) if (folder / name).is_dir()]
    if not have:
        return None
    hint = "take the whole kit, as FLARE has made it"
    if len(have) == 1:
        (missing,) = {_STARTUP, _LOCAL} - set(have)
        raise KitError("HALF_A_KIT", f"{folder} is half a start-up kit: it has {have[0]} and no {missing}", hint)
    files = [folder / _STARTUP / name for name in _ROLES if (folder / _STARTUP / name).is_file()]
    if len(files) != 1:
        found = " and ".join(file.name for file in files) or f"none of {', '.join(_ROLES)}"
        raise KitError("HALF_A_KIT", f"{folder / _STARTUP} is no start-up kit's: it has {found}", hint)
    role = _ROLES[files[0].name]
    name, scheme, ports = _named(files[0], role)
    return Kit(folder, role, name or folder.name, scheme, ports)


def _named(file: Path, role: str) -> tuple[str, str, frozenset[int]]:
    """The site's name and scheme, and a server's ports, from where FLARE reads them."""
    try:
        config: Any = json.loads(file.read_bytes())
        if role == SERVER:
            (server, *_) = config["servers"]
            service = server["service"]
            ports = {int(str(service["target"]).rpartition(":")[2]), int(server.get("admin_port") or 0)}
            name = str(server.get("identity") or server.get("admin_server") or "")
            return name, str(service["scheme"]), frozenset(ports)
        if role == CLIENT:
            (server, *_) = config["servers"]
            return str(config["client"].get("fqsn") or ""), str(server["service"]["scheme"]), frozenset()
        if role == RELAY:
            return str(config["identity"]), str(config["connect_to"]["scheme"]), frozenset()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise KitError("HALF_A_KIT", f"{file} is not as FLARE has it ({reason})", "take it as FLARE made it") from None
    return "", "", frozenset()
