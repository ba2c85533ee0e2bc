"""What this machine and this process can use, and why not the rest: `nvflare-rdma doctor`.

`examine` collects, and `doctor_text` prints. Nothing is changed; RDMA devices are opened and closed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nvflare_rdma import class_list
from nvflare_rdma.cli.doctor_host import OK, PROBLEM, Check, check_host
from nvflare_rdma.cli.kit_certificates import certificate_in
from nvflare_rdma.cli.output import CommandError
from nvflare_rdma.cli.port_use import PROC
from nvflare_rdma.errors import ConfigError, FabricUnavailable, UnsupportedVersionError
from nvflare_rdma.fabric import DEVICE_FILES, SYSFS, probe
from nvflare_rdma.fabric.verbs import (
    PortInfo,
    choose_gid,
    choose_ports,
    device_file,
    device_file_reason,
    list_ports,
    memlock_limit,
    memlock_needed,
    memlock_reason,
    pyverbs_reason,
)
from nvflare_rdma.flare_compat import require_flare
from nvflare_rdma.settings import Settings, load_settings
from nvflare_rdma.version import __version__

PACKAGES = ("nvflare", "numpy", "torch", "bitsandbytes")
#: What programs open devices by; drivers of adapters; software devices; connection managers (for iWARP).
MODULES = (
    *("ib_core", "ib_uverbs"),
    *("mlx5_ib", "mlx4_ib", "irdma", "bnxt_re", "qedr", "hns_roce_hw_v2", "mana_ib", "erdma", "iw_cxgb4", "efa"),
    *("rdma_rxe", "siw", "rdma_cm", "rdma_ucm", "iw_cm"),
)
#: What a RoCE packet has around its data at most (the kernel's iboe_get_mtu).
ROCE_HEADERS = 96


@dataclass(frozen=True)
class GidReport:
    """One entry of a port's GID table."""

    index: int
    address: str
    kind: str
    netdev: str
    chosen: str
    """Why this one of the port's; "" if it is not."""


@dataclass(frozen=True, kw_only=True)
class PortReport:
    """One port of an RDMA device.

    `chosen` says whether rails would use it. `netdevs` has the MTU of the interfaces that the GIDs are for, None if
    this network namespace does not have the interface. `packet_bytes` is what one RDMA packet carries, at most.
    """

    device: str
    port: int
    state: str
    transport: str
    software: bool
    rate: str
    chosen: bool
    device_file: str
    cannot_open: str
    refusal: str
    """Why no rail can be made on it, even if it is up."""
    netdevs: dict[str, int | None]
    packet_bytes: int | None
    packet_bytes_unknown: str
    gids: list[GidReport]
    no_gid: str


@dataclass(frozen=True)
class FabricReport:
    """Whether a fabric can be used and may be used, and why not."""

    usable: bool
    allowed: bool
    """By the setting `rdma_fabrics`."""
    reason: str
    uses: str


@dataclass(frozen=True)
class ClassListReport:
    """Whether jobs that bring no code of their own may use this package at a site."""

    file: str
    missing: list[str]
    advice: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor has found on this machine."""

    nvflare_rdma: str
    python: str
    executable: str
    system: str
    user: int
    packages: dict[str, str | None]
    problems: list[str]
    """What keeps the driver from starting."""
    settings_from: str
    settings: dict[str, Any]
    settings_changed: list[str]
    links: str
    """How the links of the site are protected; "" if no site was named."""
    ports: list[PortReport]
    locked_memory_limit: int | None
    locked_memory_needed: int
    locked_memory_reason: str
    modules_loaded: list[str]
    modules_missing: list[str]
    pyverbs_reason: str
    rdma_core: str
    huge_pages: str
    fabrics: dict[str, FabricReport] = field(default_factory=dict)
    class_list: ClassListReport | None = None
    """None unless the folder of a site was given."""
    checks: list[Check] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong that has to be mended."""
        return not self.problems and all(check.verdict != PROBLEM for check in self.checks)


def examine(
    workspace: Path | None = None, sysfs: Path = SYSFS, files: Path = DEVICE_FILES, proc: Path = PROC
) -> Report:
    """Look at this machine and process. `workspace` is the folder of a FLARE site: see `read_settings`."""
    settings, settings_from, problems = read_settings(workspace)
    budget = settings.rdma_memory_budget_bytes
    loaded = [name for name in MODULES if (sysfs / "module" / name).is_dir()]
    fabrics = probe(replace(settings.fabric_options, sysfs=sysfs, device_files=files))
    no_pyverbs = pyverbs_reason()
    huge_pages, packages = _huge_pages(sysfs), {name: installed(name) for name in PACKAGES}
    return Report(
        nvflare_rdma=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()}",
        user=os.geteuid(),
        packages=packages,
        problems=problems,
        settings_from=settings_from,
        settings={each.name: getattr(settings, each.name) for each in fields(Settings)},
        settings_changed=[each.name for each in fields(Settings) if getattr(settings, each.name) != each.default],
        links=_protection(workspace) if workspace is not None else "",
        ports=_examine_ports(settings, sysfs, files),
        locked_memory_limit=memlock_limit(),
        locked_memory_needed=memlock_needed(budget),
        locked_memory_reason=memlock_reason(budget),
        modules_loaded=loaded,
        modules_missing=[name for name in MODULES if name not in loaded],
        pyverbs_reason=no_pyverbs,
        rdma_core="" if no_pyverbs else _rdma_core(),
        huge_pages=huge_pages,
        fabrics={
            name: FabricReport(state.usable, name in settings.rdma_fabrics, state.reason, state.detail)
            for name, state in fabrics.items()
        },
        class_list=_examine_class_list(workspace),
        checks=[
            *_certificate(workspace),
            *check_host(settings, None if problems else workspace, packages["nvflare"], huge_pages, proc),
        ],
    )


def _certificate(workspace: Path | None) -> Iterator[Check]:
    """Whether a site's certificate can be used: without it, its processes get no connection at all."""
    if workspace is None or not (workspace / "startup" / "rootCA.pem").is_file():
        return
    try:
        name, until = certificate_in(workspace / "startup")
    except CommandError as error:
        yield Check("certificate", PROBLEM, str(error), error.hint)
    else:
        yield Check("certificate", OK, f"of {name!r}, until {until:%Y-%m-%d}")


def _examine_class_list(workspace: Path | None) -> ClassListReport | None:
    if workspace is None or not (workspace / "local").is_dir():
        return None
    try:
        found = class_list.read(workspace)
    except ConfigError as error:
        return ClassListReport("", [], str(error))
    return ClassListReport(str(found.file), found.missing, found.advice)


def read_settings(workspace: Path | None) -> tuple[Settings, str, list[str]]:
    """The settings of a FLARE process whose workspace that is (None: the current folder, if it looks like one), where
    they are from, and what keeps them from being used (then they are the defaults)."""
    told, found = "the environment", None
    try:
        require_flare("the driver")
        from nvflare.fuel.f3.comm_config import CommConfigurator
        from nvflare.fuel.utils.config import ConfigFormat
        from nvflare.fuel.utils.config_service import ConfigService

        folder = workspace or Path()
        names = [f"comm_config{extension}" for extension in ConfigFormat.config_ext_formats()]
        paths = [where / name for where in (folder, folder / "local") for name in names]
        found = next((path for path in paths if path.is_file()), None)
        if found is not None:
            told = f"{found} and the environment"
            _check_json(found)
        elif workspace is None:
            told += " (of a site: --kit FOLDER)"
        elif (folder / "startup").is_dir():  # a site's, as FLARE provisions it: without one
            told += f" ({folder} has no comm_config.json)"
        else:
            raise ConfigError(
                f"--kit {folder}: that is no folder of a FLARE site. There is no comm_config.json in it, nor in "
                "local below it, and no startup"
            )
        # FLARE searches a folder with all that is below it; were none given, the current one. The last has none.
        ConfigService.reset()
        CommConfigurator.reset()
        ConfigService.initialize({}, [str(found.parent if found else Path(__file__).parents[1] / "plugin")])
        return load_settings(), told, []
    except (ConfigError, UnsupportedVersionError) as error:
        problem = str(error)
    except ImportError as error:
        problem = f"NVIDIA FLARE can't be loaded: {error}. Install nvflare-rdma again."
    except OSError as error:
        problem = f"{error.filename or workspace} can't be read: {error.strerror}. Run this as whoever owns it"
    except Exception as error:  # noqa: BLE001 - FLARE's parsers of files raise what they like
        problem = f"{found or 'the configuration'} can't be read: {error!r}. Correct it, or take it away"
    return Settings(), told, [problem]


def has_configuration(folder: Path) -> bool:
    """Whether a folder, which need not be a kit, has a comm_config of its own."""
    return any(path.is_file() for path in folder.glob("comm_config.*"))


def _check_json(file: Path) -> None:
    """Refuse what is no JSON, of which FLARE would speak on stderr besides."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}. Run this as whoever owns it") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}. Correct it, or take it away") from None


def settings_of(folder: Path | None) -> Settings:
    """The settings of a FLARE process whose workspace that is, as `read_settings`.

    Raises:
        CommandError: they can't be used.
    """
    settings, told, problems = read_settings(folder)
    if problems:
        problem = problems[0] if folder is None or str(folder) in problems[0] else f"{told}: {problems[0]}"
        raise CommandError("INVALID_INPUT", problem, "mend it; `nvflare-rdma doctor` shows what is set")
    return settings


def _protection(workspace: Path) -> str:
    """How the links of a site are protected: with the certificates of its start-up kit, if it has any."""
    if (workspace / "startup" / "rootCA.pem").is_file():
        return "TLS with the certificates in startup, and sealed chunks"
    return (
        "CLEAR: there are no certificates in startup. Nothing is encrypted and nobody is known, so whoever is on the "
        "way can read and change models. Use it on one host, or where the network is yours alone"
    )


def installed(package: str) -> str | None:
    """The version of a package that is installed here; None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_ports(settings: Settings, sysfs: Path, files: Path) -> list[PortReport]:
    ports = list_ports(sysfs)
    try:
        chosen = choose_ports(ports, settings.verbs)
    except FabricUnavailable:
        chosen = []  # `probe` says why
    return [_examine_port(port, port in chosen, settings, sysfs, files) for port in ports]


def _examine_port(port: PortInfo, chosen: bool, settings: Settings, sysfs: Path, files: Path) -> PortReport:
    gid, why, no_gid = None, "", ""
    try:
        if not port.refusal:
            gid, why = choose_gid(port, settings.verbs)
    except FabricUnavailable as error:
        no_gid = str(error)
    packet_bytes, unknown = _packet_bytes(port)
    return PortReport(
        device=port.device,
        port=port.number,
        state=port.state,
        transport=port.transport,
        software=port.software,
        rate=port.rate,
        chosen=chosen,
        device_file=device_file(port.device, sysfs),
        cannot_open=device_file_reason(port.device, sysfs, files),
        refusal=port.refusal,
        netdevs={name: _mtu(name, sysfs) for name in dict.fromkeys(each.netdev for each in port.gids if each.netdev)},
        packet_bytes=packet_bytes,
        packet_bytes_unknown=unknown,
        gids=[
            GidReport(each.index, str(each.address), each.kind, each.netdev, why if each == gid else "")
            for each in port.gids
        ],
        no_gid=no_gid,
    )


def _mtu(netdev: str, sysfs: Path) -> int | None:
    try:
        return int((sysfs / "class/net" / netdev / "mtu").read_text())
    except (OSError, ValueError):
        return None


def roce_packet_bytes(mtu: int) -> int:
    """What a RoCE packet carries over an interface with that MTU; 0 if it is too small for any."""
    return next((size for size in (4096, 2048, 1024, 512, 256) if size + ROCE_HEADERS <= mtu), 0)


def _packet_bytes(port: PortInfo) -> tuple[int | None, str]:
    """The MTU in force (active_mtu, ibv_query_port(3)), or why it can't be told."""
    try:
        from nvflare_rdma.fabric.verbs import Context

        with Context(name=port.device) as context:
            return 128 << context.query_port(port.number).active_mtu, ""
    except ImportError:
        return None, "pyverbs can't be loaded"
    except Exception as error:  # noqa: BLE001 - whatever pyverbs raises, it is what one wants to know
        return None, f"the device can't be opened: {error}"


def _rdma_core() -> str:
    """The version of rdma-core's libibverbs, which pyverbs has loaded; its file is named libibverbs.so.1.14.44.0."""
    try:
        found = re.search(r"/libibverbs\.so\.1\.\d+\.(\d+\.\d+)", Path("/proc/self/maps").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _huge_pages(sysfs: Path) -> str:
    try:
        text = (sysfs / "kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""
