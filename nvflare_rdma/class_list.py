"""FLARE's list of the classes that jobs may use which bring no code of their own: `class_allow_list` of a site's
`resources.json`. FLARE's standard list has FLARE's classes only, so that such jobs can't use this package's.

To import this module takes no FLARE.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.logs import get_logger

log = get_logger(__name__)

KEY = "class_allow_list"
FILTERS = "nvflare_rdma.filters"
STREAMING = "nvflare_rdma.streaming"
PERSISTORS = "nvflare_rdma.persistors"
#: What has all classes of this package that a job may name.
ENTRIES = (FILTERS, STREAMING, PERSISTORS)

_FILES = ("resources.json", "resources.json.default")  # FLARE reads the first that there is
_ANY = "*"
_MODE, _ONLY_WARN = "class_list_enforcement_mode", "warn"
_CUSTOM = "custom"  # the folder of an app with its code, by which FLARE tells


def line(entries: Sequence[str] = ENTRIES) -> str:
    """What is to be added to the list, as it is written there."""
    return ", ".join(f'"{entry}"' for entry in entries)


@dataclass(frozen=True)
class ClassList:
    """What a site's list says about this package.

    Attributes:
        file: where the list is, or has to be.
        listed: whether the site has a list; if not, FLARE's standard one holds.
        missing: entries that jobs without code of their own need and that are not allowed there.
    """

    file: Path
    listed: bool
    missing: list[str]

    @property
    def advice(self) -> str:
        """What to do about what is missing; "" if nothing is."""
        if not self.missing:
            return ""
        if self.listed:
            return f"add {line(self.missing)} to {KEY} in {self.file}"
        return f"add {KEY} to {self.file}, with the entries of FLARE's standard list and {line(self.missing)}"


def read(site: Path) -> ClassList:
    """Look at the list of a site whose folder (the one that has `local` in it) that is.

    Raises:
        ConfigError: the file can't be read.
    """
    file = _file(site)
    resources = _resources(file)
    return ClassList(file, isinstance(resources.get(KEY), list), missing_in(resources))


def missing_in(resources: Mapping[str, Any]) -> list[str]:
    """The entries that jobs without code of their own need and that are not allowed by what a `resources.json` has."""
    entries: Any = resources.get(KEY)
    enforced = resources.get(_MODE) != _ONLY_WARN
    listed = isinstance(entries, list)
    return [each for each in ENTRIES if enforced and not (listed and _allowed(each, entries))]


def with_missing(resources: Mapping[str, Any]) -> list[Any]:
    """The list of a `resources.json`, or FLARE's standard one if it has none, and what is missing in it."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    return [*resources.get(KEY, DEFAULT_CLASS_ALLOW_LIST), *missing_in(resources)]


def allow(simulator: Path) -> ClassList:
    """Let jobs without code of their own use this package in a workspace of FLARE's simulator, where FLARE's standard
    list holds. A list of the user's own, from which entries of the standard one are missing, stays as it is. Returns
    what the list says then.

    Raises:
        ConfigError: the file can't be read.
    """
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    found = read(simulator)
    resources = _resources(found.file)
    entries = resources.get(KEY, list(DEFAULT_CLASS_ALLOW_LIST))
    if not found.missing or not isinstance(entries, list) or not set(DEFAULT_CLASS_ALLOW_LIST) <= set(entries):
        return found
    found.file.parent.mkdir(parents=True, exist_ok=True)
    resources = {"format_version": 2, **resources, KEY: with_missing(resources)}
    found.file.write_text(json.dumps(resources, indent=4))
    return ClassList(found.file, True, [])


def allow_for(job: Path, simulator: Path) -> None:
    """Call `allow` if the job in that folder needs it, and log what follows.

    Raises:
        ConfigError: the simulator's list can't be read.
    """
    configs = list(job.glob("*/config/config_fed_*"))
    named = any("nvflare_rdma." in path.read_text(errors="replace") for path in configs if path.is_file())
    if not named or any(job.glob(f"*/{_CUSTOM}")):  # in the simulator the code of one app counts for all
        return
    if advice := allow(simulator).advice:
        log.warning("the job brings no code of its own, so FLARE will refuse this package's classes: %s", advice)


def sites_without_code(apps: Mapping[str, Any], packages: Sequence[str]) -> list[str]:
    """The sites ("server" and "@ALL" among them) where FLARE's list counts, because their app brings no code.

    Args:
        apps: those of a `FedJob`, by site.
        packages: what is installed everywhere and so never copied into the job.
    """
    from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME

    parts = {site: [app.app_config] for site, app in apps.items()}
    if ALL_SITES in parts:  # then server and sites have one app together
        parts = {ALL_SITES: parts[ALL_SITES] + parts.get(SERVER_SITE_NAME, [])}
    return [site for site, configs in parts.items() if not _brings_code(configs, packages)]


def _brings_code(configs: Sequence[Any], packages: Sequence[str]) -> bool:
    from nvflare.job_config.fed_app_config import ClientAppConfig, FedAppConfig, ServerAppConfig
    from nvflare.job_config.fed_job_config import FedJobConfig

    for config in configs:
        files = any(kind != "config" for _, _, kind in config.file_sources)
        if files or config.ext_dirs or any(os.path.exists(script) for script in config.ext_scripts):
            return True
    # Classes that are not FLARE's are copied, too. FLARE's own export knows which.
    plain = [copy.copy(config) for config in configs]
    for config in plain:
        config.file_sources = []
    server = next((config for config in plain if isinstance(config, ServerAppConfig)), None)
    client = next((config for config in plain if isinstance(config, ClientAppConfig)), None)
    job = FedJobConfig("job", 1)
    job.set_app_packages(list(packages))
    job.add_fed_app("app", FedAppConfig(server, client))
    with tempfile.TemporaryDirectory() as folder:
        try:
            job.generate_job_config(folder)
        except Exception as error:  # noqa: BLE001 - FLARE's; whoever exports the job will be told
            log.debug("whether the job brings code can't be told: %s", error)
            return True
        return any(Path(folder).glob(f"*/*/{_CUSTOM}"))


def _file(site: Path) -> Path:
    paths = [site / "local" / name for name in _FILES]
    return next((path for path in paths if path.exists()), paths[-1])


def _resources(file: Path) -> dict[str, Any]:
    try:
        resources = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    if not isinstance(resources, Mapping):
        raise ConfigError(f"{file} must have a JSON object, but has a {type(resources).__name__}")
    return dict(resources)


def _allowed(entry: str, entries: list[Any]) -> bool:
    """Whether FLARE lets jobs use all that is below `entry`: the list has it, or what stands for it."""
    return any(each == _ANY or f"{entry}.".startswith(f"{str(each).removesuffix('.')}.") for each in entries)
