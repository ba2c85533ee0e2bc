"""What of this package is set in a start-up kit, whoever has set it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma import class_list
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.kits.edits import DRIVER_PATH, door_in, driver_folders, starts_in_images
from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.kits.files import comm_config, resources
from nvflare_rdma.kits.find import ADMIN, Kit
from nvflare_rdma.kits.plan import RECORD
from nvflare_rdma.settings import PREFIX, settings_in

_PLUGIN_FILE = "rdma_driver.py"


@dataclass(kw_only=True)
class KitState:
    """What is set in one kit.

    Attributes:
        site: its name.
        role: what it starts.
        folder: where it is.
        comm_config: the file with the settings; "" if there is none.
        resources: the file with components and the list of classes; "" if there is none.
        settings: the `rdma_*` settings that are there, as they are written.
        driver_path: FLARE's `comm_driver_path`; "" if it is not set.
        driver: whether the path has a folder of this package's driver.
        parent_door: whether its parent has a `ParentDoor`.
        classes_missing: entries that jobs without code of their own need; None if no jobs run there.
        enabled: whether `nvflare-rdma enable` has put something in, and it has not been taken out.
        signed: whether nothing in it may be changed.
        problems: what is wrong, or can't be read.
    """

    site: str
    role: str
    folder: str
    comm_config: str = ""
    resources: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    driver_path: str = ""
    driver: bool = False
    parent_door: bool = False
    classes_missing: list[str] | None = None
    enabled: bool = False
    signed: bool = False
    problems: list[str] = field(default_factory=list)


def state_of(kit: Kit) -> KitState:
    """What is set in a kit. What can't be read is among the problems."""
    state = KitState(site=kit.name, role=kit.role, folder=str(kit.folder), signed=kit.signed is not None)
    if kit.role == ADMIN:
        return state
    state.enabled = (kit.local / RECORD).exists()
    for look in (_look_at_comm_config, _look_at_resources):
        try:
            look(kit, state)
        except KitError as error:
            state.problems.append(str(error))
    return state


def _look_at_comm_config(kit: Kit, state: KitState) -> None:
    file = comm_config(kit)
    if file.data is not None:
        state.comm_config = str(file.path)
    elif file.content and file.like is not None:  # FLARE reads what it would be made of
        state.comm_config = str(file.like)
    state.settings = {name: value for name, value in file.content.items() if name.startswith(PREFIX)}
    state.driver_path = str(file.content.get(DRIVER_PATH) or "")
    folders = driver_folders(file.content)
    state.driver = bool(folders)
    try:
        settings = settings_in(file.content)
    except ConfigError as error:
        state.problems.append(f"{file.path}: {error}")
        return
    if settings.rdma_upgrade and not folders:
        state.problems.append(f"{file.path}: rdma_upgrade does nothing, as {DRIVER_PATH} has no folder of the driver")


def _look_at_resources(kit: Kit, state: KitState) -> None:
    file = resources(kit)
    if file is None:
        return
    state.resources = str(file.path)
    state.classes_missing = class_list.missing_in(file.content)
    state.parent_door = door_in(file)
    folders = [] if starts_in_images(file) else driver_folders({DRIVER_PATH: state.driver_path})
    gone = [folder for folder in folders if not (folder / _PLUGIN_FILE).is_file()]
    state.problems.extend(f"{state.comm_config}: {DRIVER_PATH} names {folder}, which has no driver" for folder in gone)
