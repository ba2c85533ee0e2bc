"""The `rdma_*` settings: read and checked once per process, from where FLARE reads its own.

`comm_config.json` (top level keys) or the environment (`NVFLARE_RDMA_RAILS=4`), in FLARE's order of precedence
(`nvflare.fuel.utils.config_service.ConfigService`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nvflare_rdma.channel.controllers import CONTROLLERS
from nvflare_rdma.channel.protocol import INTEGRITY
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric import FABRICS, MAX_RAILS, FabricOptions, VerbsOptions, parse_fabrics

PREFIX = "rdma_"
_ENV_PREFIX = "NVFLARE_RDMA_"
KIB, MIB = 1024, 1024 * 1024
MINUTE, HOUR = 60.0, 3600.0
PATIENCE = PREFIX + "patience"
_LEAST_PATIENCE, _MOST_PATIENCE = 1.0, 24 * HOUR


@dataclass(frozen=True)
class Settings:
    """The settings of a process. All are optional.

    Attributes:
        rdma_fabrics: the fabrics that may be used, the best first.
        rdma_chunk_bytes: the size of one granted chunk. Six times as many for tensors in shared memory.
        rdma_rails: how many parallel TCP connections there are to a peer at most; the link opens as many as it needs.
        rdma_memory_budget_bytes: how many bytes all messages of the process may hold until they are handed over, or
            sent.
        rdma_controller: who decides how much is granted: `adaptive` (follows the link) or `fixed` (4 chunks).
        rdma_integrity: whether each chunk has a checksum: `auto` (over tcp), `on` or `off`. Sealed chunks need none.
        rdma_tcp_congestion: the kernel's congestion control for rails (`bbr`, `cubic`, ...), "" for the system's.
        rdma_device: the RDMA devices to use (`mlx5_0` or `mlx5_0:1`), () to have one chosen.
        rdma_gid_index: the entry of the devices' GID table, None to have one chosen.
        rdma_ack_timeout: see `VerbsOptions`.
        rdma_retry_count: see `VerbsOptions`.
        rdma_data_ports: where this side listens for direct links: `auto` (the server on any free port, clients
            nowhere), `none`, a port or a range.
        rdma_patience: seconds for which a transfer whose link is gone waits for its peer.
        rdma_upgrade: whether the driver takes over FLARE's schemes `tcp` and `stcp`.
    """

    rdma_fabrics: tuple[str, ...] = tuple(FABRICS)
    rdma_chunk_bytes: int = MIB
    rdma_rails: int = 16
    rdma_memory_budget_bytes: int = 64 * MIB
    rdma_controller: str = "adaptive"
    rdma_integrity: str = "auto"
    rdma_tcp_congestion: str = ""
    rdma_device: tuple[str, ...] = ()
    rdma_gid_index: int | None = None
    rdma_ack_timeout: int = 16
    rdma_retry_count: int = 6
    rdma_data_ports: str | tuple[int, int] = "auto"
    rdma_patience: float = 30 * MINUTE
    rdma_upgrade: bool = False

    @property
    def verbs(self) -> VerbsOptions:
        """The options of the verbs fabric. A device that the kernel emulates is slower than tcp: it has to be asked
        for, by its name or by leaving no other fabric."""
        return VerbsOptions(
            self.rdma_device,
            self.rdma_gid_index,
            bool(self.rdma_device) or self.rdma_fabrics == ("verbs",),
            self.rdma_ack_timeout,
            self.rdma_retry_count,
        )

    @property
    def fabric_options(self) -> FabricOptions:
        """The options of all fabrics."""
        return FabricOptions(self.rdma_rails, self.rdma_memory_budget_bytes, self.rdma_tcp_congestion, self.verbs)


_RANGES = {
    "rdma_chunk_bytes": (64 * KIB, 64 * MIB),
    "rdma_rails": (1, MAX_RAILS),
    "rdma_memory_budget_bytes": (MIB, 1 << 50),
    "rdma_gid_index": (0, 65535),
    "rdma_ack_timeout": (1, 31),
    "rdma_retry_count": (0, 7),
}
_CHOICES = {"rdma_controller": tuple(CONTROLLERS), "rdma_integrity": INTEGRITY}
_NAMES = tuple(f.name for f in fields(Settings))


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from raw values (strings from the environment, JSON types from a file); the rest is default.

    Raises:
        ConfigError: an unknown key or a bad value; names the key, the value and what is allowed.
    """
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _NAMES:
            raise ConfigError(f"unknown setting {name!r}={value!r}. Allowed: {', '.join(_NAMES)}.")
        if name == "rdma_fabrics":
            parsed[name] = parse_fabrics(str(value))
        elif name in _CHOICES:
            parsed[name] = _choice(name, value)
        elif name == "rdma_data_ports":
            parsed[name] = _ports(str(value).strip().lower())
        elif name == PATIENCE:
            parsed[name] = parse_patience(value)
        elif name == "rdma_device":
            parsed[name] = tuple(part.strip() for part in str(value).split(",") if part.strip())
        elif name == "rdma_tcp_congestion":
            parsed[name] = str(value).strip()  # the kernel says what there is: see TcpFabric
        elif name == "rdma_upgrade":
            parsed[name] = _truth(name, value)
        else:
            parsed[name] = _integer(name, value)
    return Settings(**parsed)


def _choice(name: str, value: Any) -> str:
    choice = str(value).strip().lower()
    if choice not in _CHOICES[name]:
        raise ConfigError(f"{name}={value!r} is unknown. Allowed: {', '.join(_CHOICES[name])}.")
    return choice


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{name}={value!r} is neither true nor false. Allowed: true, false.")
    return text == "true"


def _ports(text: str) -> str | tuple[int, int]:
    if text in ("auto", "none"):
        return text
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < low <= high < 65536:
        raise ConfigError(
            f"rdma_data_ports={text!r} is no port. Allowed: auto, none, a port (20000) or a range (20000-20010)."
        )
    return low, high


def parse_patience(value: Any, name: str = PATIENCE) -> float:
    """Seconds, from a number or a text such as "90", "90s", "30m" or "4h". `name` is whose value it is.

    Raises:
        ConfigError: it is neither, or out of range.
    """
    allowed = 'Allowed: seconds, or a text such as "90s", "30m" or "4h"; 1 s to 24 h.'
    text = value.strip().lower() if isinstance(value, str) else str(value)
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)", text)
    if match is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name}={value!r} is no time. {allowed}")
    seconds = float(match[1]) * {"": 1.0, "s": 1.0, "m": MINUTE, "h": HOUR}[match[2]]
    if not _LEAST_PATIENCE <= seconds <= _MOST_PATIENCE:
        raise ConfigError(f"{name}={value!r} is out of range. {allowed}")
    return seconds


def as_time(seconds: float) -> str:
    """Seconds in words, as short as they can be: 14400 is "4 h", 90 is "90 s"."""
    for unit, name in ((HOUR, "h"), (MINUTE, "min")):
        if seconds >= unit and seconds % unit == 0:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"


def _integer(name: str, value: Any) -> int:
    low, high = _RANGES[name]
    try:
        if isinstance(value, bool | float):
            raise ValueError("not a whole number")
        number = int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={value!r} is not a whole number. Allowed: {low} to {high}.") from None
    if not low <= number <= high:
        raise ConfigError(f"{name}={number} is out of range. Allowed: {low} to {high}.")
    return number


def load_settings() -> Settings:
    """The process's settings from FLARE's configuration and the environment.

    Raises:
        ConfigError: as `parse_settings`.
    """
    return parse_settings(_present())


def settings_in(config: Mapping[str, Any]) -> Settings:
    """The settings that a `comm_config.json` with this content has, as a process would read them from there.

    Raises:
        ConfigError: as `parse_settings`.
    """
    return parse_settings({name: str(value) for name, value in config.items() if name.startswith(PREFIX)})


def wants_upgrade() -> bool:
    """What `rdma_upgrade` is, whatever is wrong with other settings: who uses those says so.

    Raises:
        ConfigError: it is neither true nor false.
    """
    name = "rdma_upgrade"
    return parse_settings({key: value for key, value in _present().items() if key == name}).rdma_upgrade


def settings_environment(patience: float | None = None) -> dict[str, str]:
    """The environment variables that give another process, which does not read this one's configuration, the same
    settings, but for `patience` if that is given."""
    values = _present() | ({} if patience is None else {PATIENCE: patience})
    return {_ENV_PREFIX + name[len(PREFIX) :].upper(): str(value) for name, value in values.items()}


def _present() -> dict[str, Any]:
    from nvflare.fuel.f3.comm_config import CommConfigurator

    configurator = CommConfigurator()
    config = configurator.get_config() or {}
    present = {key for key in config if key.startswith(PREFIX)}
    present |= {PREFIX + key[len(_ENV_PREFIX) :].lower() for key in os.environ if key.startswith(_ENV_PREFIX)}
    # get_str_var applies FLARE's precedence; parse_settings checks numbers: its message can say the range.
    return {key: configurator.get_str_var(key) for key in sorted(present)}
