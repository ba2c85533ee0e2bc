"""What is to be set in start-up kits, checked as the package itself will read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.settings import parse_settings

#: The folder for FLARE's `comm_driver_path`, of this installation.
PLUGIN = str(Path(__file__).resolve().parents[1] / "plugin")
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Wanted:
    """What is to be set in kits.

    Attributes:
        settings: for `comm_config.json`, by their names.
        ports: a port or a range, `rdma_data_ports` of those whose parent is to have a `ParentDoor`; "" for nobody's.
        driver: the driver's folder; "" for this installation's where processes start on this host, and for none
            where they start in images.
    """

    settings: Mapping[str, Any]
    ports: str = ""
    driver: str = ""

    @property
    def upgrades(self) -> bool:
        """Whether the driver is to take over FLARE's own schemes."""
        return bool(self.settings.get("rdma_upgrade"))

    def settings_of(self, door: bool) -> dict[str, Any]:
        """The settings of a kit whose parent has a door or not."""
        return {**self.settings, **({"rdma_data_ports": self.ports} if door else {})}


def wanted(
    fabrics: str | None = None,
    memory_budget: str | int | None = None,
    data_port: str | int | None = None,
    patience: str | float | None = None,
    upgrade_driver: bool = False,
    driver_path: str | None = None,
) -> Wanted:
    """What these values ask for.

    Args:
        fabrics: `rdma_fabrics`.
        memory_budget: bytes, or a text such as "512MiB" or "4GiB".
        data_port: the port, or the range, of the one port for all jobs.
        patience: `rdma_patience`.
        upgrade_driver: whether the driver takes over FLARE's schemes tcp and stcp.
        driver_path: the driver's folder, as the site's processes see it.

    Raises:
        KitError: a value is wrong; says which, and what is allowed.
    """
    settings: dict[str, Any] = {}
    if fabrics is not None:
        settings["rdma_fabrics"] = _checked("fabrics", "rdma_fabrics", fabrics)
    if memory_budget is not None:
        nbytes = _bytes(memory_budget)
        settings["rdma_memory_budget_bytes"] = _checked("memory_budget", "rdma_memory_budget_bytes", nbytes)
    if patience is not None:
        settings["rdma_patience"] = _checked("patience", "rdma_patience", patience)
    if upgrade_driver:
        settings["rdma_upgrade"] = True
    ports = ""
    if data_port is not None:
        ports = _checked("data_port", "rdma_data_ports", str(data_port))
        if not ports[0].isdigit():  # "auto" and "none" are no ports, and need no door
            raise _bad("data_port", data_port, "a port (8004) or a range (8004-8010) is expected")
        first, last = port_range(ports)
        ports = f"{first}-{last}" if last > first else f"{first}"
    if driver_path is not None and not driver_path.startswith("/"):
        raise _bad("driver_path", driver_path, "an absolute path is expected, as the site's processes see it")
    return Wanted(settings, ports, driver_path or "")


def port_range(ports: str) -> tuple[int, int]:
    """The first and the last port of `Wanted.ports`."""
    first, _, last = ports.partition("-")
    return int(first), int(last or first)


def _bad(what: str, value: Any, reason: str) -> KitError:
    return KitError("INVALID_VALUE", f"{what}={value!r}: {reason}", "give another value, or leave it out")


def _checked(what: str, name: str, value: Any) -> Any:
    """The value as it is to be written, if the package will take it."""
    text = str(value).strip()
    try:
        parse_settings({name: text})
    except ConfigError as error:
        raise _bad(what, value, str(error)) from None
    return value if isinstance(value, int | float) else text


def _bytes(value: str | int) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)", str(value).strip().lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise _bad("memory_budget", value, "bytes are expected, or a text such as 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
