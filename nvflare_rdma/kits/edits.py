"""What is put into the JSON objects of a start-up kit, and how that comes out again. Nothing is read or written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvflare_rdma import class_list
from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.kits.files import JsonFile
from nvflare_rdma.kits.find import Kit
from nvflare_rdma.kits.wanted import PLUGIN, Wanted

DRIVER_PATH = "comm_driver_path"
DOOR = {"id": "rdma_door", "path": "nvflare_rdma.streaming.ParentDoor", "args": {}}
_COMPONENTS = "components"
_OWN_FOLDER = os.path.join("nvflare_rdma", "plugin")
#: Components by which FLARE starts jobs in images.
_IN_IMAGES = ("docker_launcher", "k8s_launcher")
#: Schemes that the driver takes over.
TCP = ("tcp", "stcp")


@dataclass(frozen=True)
class Put:
    """What was put into one file.

    Attributes:
        keys: those at the top level that were set, with `is` and, where there was one, `was`.
        entries: of the list of classes.
        standard: the list was made, of these entries of FLARE's and of `entries`; None if there was one.
        door: whether the component was added.
    """

    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[str] = field(default_factory=list)
    standard: list[str] | None = None
    door: bool = False

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Put:
        """What `as_json` gave.

        Raises:
            TypeError, LookupError: it is something else.
        """
        put = cls(**saved)
        if not all("is" in each for each in put.keys.values()):
            raise LookupError("a key without value")
        return put

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    def followed_by(self, later: Put, content: Mapping[str, Any]) -> Put:
        """What was put in by this and then by `later`, which found `content`. What was there before this counts as
        long as nobody else has changed it."""
        keys = dict(self.keys)
        for name, each in later.keys.items():
            known = keys.get(name)
            ours = known is not None and content.get(name) == known["is"]
            keys[name] = {**known, "is": each["is"]} if known is not None and ours else each
        standard = self.standard if later.standard is None else later.standard
        entries = list(dict.fromkeys([*self.entries, *later.entries]))
        return Put(keys, entries, standard, self.door or later.door)


def put_in_comm_config(
    kit: Kit, config: JsonFile, resources: JsonFile | None, wanted: Wanted, door: bool, elsewhere: bool
) -> tuple[dict[str, Any], Put, list[str]]:
    """`comm_config.json` with what is wanted, what that has put in, and what the operator should know. `elsewhere` says
    that this installation is not what its processes will use.

    Raises:
        KitError: the driver is wanted where nobody knows its folder.
    """
    values, notes = wanted.settings_of(door), list[str]()
    in_images = resources is not None and starts_in_images(resources)
    if wanted.driver or not (in_images or elsewhere):
        values[DRIVER_PATH] = _with_driver(config.content.get(DRIVER_PATH), wanted.driver or PLUGIN)
    elif wanted.upgrades and not config.content.get(DRIVER_PATH):
        raise KitError(
            "NO_DRIVER_PATH",
            f"{config.path}: its processes start in images, where the driver's folder is not known",
            "say it with --driver-path; `nvflare-rdma driver-path`, run in the image, prints it",
        )
    elif in_images and not config.content.get(DRIVER_PATH):
        notes.append("the driver is not set, since processes start in images: --driver-path FOLDER sets it")
    if wanted.upgrades and kit.scheme not in TCP:
        notes.append(
            f"it speaks {kit.scheme or 'an unknown scheme'} with the server, which stays FLARE's; the driver takes "
            "over the connections between its own processes"
        )
    if in_images and "rdma_data_ports" in values:
        notes.append(f"the container or pod has to publish port {values['rdma_data_ports']}")
    return *_with_keys(config.content, values), notes


def _with_keys(content: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], Put]:
    new, put = dict(content), Put()
    for name, value in values.items():
        if name in content and content[name] == value:
            continue
        put.keys[name] = {"is": value, **({"was": content[name]} if name in content else {})}
        new[name] = value
    return new, put


def starts_in_images(resources: JsonFile) -> bool:
    """Whether FLARE starts a site's jobs in images, where this host's folders are not."""
    return any(component.get("id") in _IN_IMAGES for component in _components(resources))


def _with_driver(known: Any, folder: str) -> str:
    """FLARE's path with the driver's folder, once: it is this installation's, and no other's."""
    folders = [each for each in str(known or "").split(os.pathsep) if each]
    if folder in folders:
        return str(known)
    return os.pathsep.join([*(each for each in folders if not each.rstrip("/").endswith(_OWN_FOLDER)), folder])


def _without_driver(known: Any, put: Mapping[str, Any]) -> str | None:
    """A path that others have changed, without the folder that was put into it; None if nothing is left."""
    before, after = (str(put.get(which) or "").split(os.pathsep) for which in ("was", "is"))
    folders = [each for each in str(known).split(os.pathsep) if each in before or each not in after]
    return os.pathsep.join(folders) or None


def put_in_resources(file: JsonFile, door: bool) -> tuple[dict[str, Any], Put]:
    """`resources.json` with what is wanted, and what that has put in.

    Raises:
        KitError: something in it is not as FLARE has it.
    """
    new, put = dict(file.content), Put()
    listed = new.get(class_list.KEY)
    if class_list.KEY in new and not isinstance(listed, list):
        reason = f"{class_list.KEY} is a {type(listed).__name__}, and FLARE wants a list"
        raise KitError("BAD_JSON", f"{file.path}: {reason}", "mend it, and try again")
    if missing := class_list.missing_in(new):
        new[class_list.KEY] = class_list.with_missing(new)
        standard = new[class_list.KEY][: -len(missing)] if listed is None else None
        put = Put(entries=missing, standard=standard)
    components = _components(file)
    if door and not has_door(components):
        if any(each.get("id") == DOOR["id"] for each in components):
            reason = f"another component has the ID {DOOR['id']!r} already"
            raise KitError("BAD_JSON", f"{file.path}: {reason}", "rename that one, and try again")
        new[_COMPONENTS] = [*components, DOOR]
        put = Put(entries=put.entries, standard=put.standard, door=True)
    return new, put


def _components(file: JsonFile) -> list[dict[str, Any]]:
    found = file.content.get(_COMPONENTS, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise KitError("BAD_JSON", f"{file.path}: {_COMPONENTS} is no list of objects", "mend it, and try again")
    return found


def door_in(file: JsonFile) -> bool:
    """Whether a site's resources have a `ParentDoor`."""
    return has_door(_components(file))


def has_door(components: list[dict[str, Any]]) -> bool:
    """Whether one of the components is a `ParentDoor`."""
    return any(each.get("path") == DOOR["path"] for each in components)


def driver_folders(content: Mapping[str, Any]) -> list[Path]:
    """The folders of this package's driver in a `comm_config.json`."""
    folders = [each for each in str(content.get(DRIVER_PATH) or "").split(os.pathsep) if each]
    return [Path(each) for each in folders if each.rstrip("/").endswith(_OWN_FOLDER)]


def take_out(content: Mapping[str, Any], put: Put) -> tuple[dict[str, Any], list[str]]:
    """The object without what was put in, and what stays because somebody else has changed it since."""
    new, kept = dict(content), []
    for name, each in put.keys.items():
        if name not in new:
            continue
        if new[name] == each["is"]:
            value = each.get("was")
        elif name == DRIVER_PATH:
            value = _without_driver(new[name], each)
        else:
            value = new[name]
            kept.append(f"{name} stays {value!r}, as it has been changed since")
        if value is None:
            del new[name]
        else:
            new[name] = value
    if isinstance(listed := new.get(class_list.KEY), list) and put.entries:
        rest = [entry for entry in listed if entry not in put.entries]
        new[class_list.KEY] = rest
        if put.standard is not None and rest == put.standard:
            del new[class_list.KEY]
    if put.door and isinstance(components := new.get(_COMPONENTS), list):
        new[_COMPONENTS] = [each for each in components if each != DOOR]
    return new, kept
