"""What has to change in a start-up kit, so that this package's settings are in it or out of it.

A file beside those that are edited, the record, says what was put in. So what comes out is exactly that, whatever else
the operator has changed meanwhile. The original of each edited file stays beside it until it is in place again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.kits.edits import TCP, Put, put_in_comm_config, put_in_resources, take_out
from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.kits.files import COMM_CONFIG, JsonFile, comm_config, read, resources
from nvflare_rdma.kits.find import ADMIN, Kit
from nvflare_rdma.kits.wanted import Wanted, port_range
from nvflare_rdma.kits.writing import Change
from nvflare_rdma.settings import settings_in

#: What an original is called: the file's name and this.
BACKUP = ".before-rdma"
#: The record.
RECORD = "rdma_enabled.json"
_VERSION = 1


@dataclass(frozen=True)
class KitPlan:
    """What changes in one kit.

    Attributes:
        kit: whose it is.
        changes: in the order in which they are to be written; none if there is nothing to do.
        notes: what the operator should know besides.
    """

    kit: Kit
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def diff(self) -> str:
        """Of all files that the operator knows."""
        return "\n".join(diff for change in self.changes if (diff := change.diff))

    @property
    def files(self) -> list[Path]:
        """What is edited, without backups and the record."""
        return [change.path for change in self.changes if change.told]


@dataclass
class _Entry:
    """What the record says of one file: its sums before and after (`before` is "" once it is unknown), whether it
    existed, and what was put in."""

    before: str
    after: str
    existed: bool
    put: Put


def enable(kit: Kit, wanted: Wanted, door: bool = False, new: bool = False) -> KitPlan:
    """Put in what is wanted. What is there already stays; nothing is taken out.

    Args:
        kit: where.
        wanted: what.
        door: whether the kit's parent takes `wanted.ports`.
        new: the kit is being made, for a host that is not this one: it has no original yet, and is signed later.

    Raises:
        KitError: the kit can't be read, its settings would be wrong, or it is signed.
    """
    if kit.role == ADMIN:
        return KitPlan(kit, notes=["an admin's kit has nothing to set"])
    if not new:
        _refuse_signed(kit)
    record = _read_record(kit)
    plan = KitPlan(kit)
    found = resources(kit)
    config = comm_config(kit)
    shared = door and _is_flares_port(kit, wanted.ports)
    content, put, notes = put_in_comm_config(kit, config, found, wanted, door and not shared, new)
    plan.notes.extend(notes)
    _check_settings(config.path, content)
    if shared:
        _check_shared(kit, config.path, content, wanted.ports)
    edited = [(config, content, put)]
    if found is not None:
        edited.append((found, *put_in_resources(found, door)))
    files: list[Change] = []
    for file, content, put in edited:
        if content == file.content:
            continue
        data = file.with_content(content)
        files.append(Change(file.path, file.data, data, file.like))
        plan.changes.extend([] if new else _keep_original(file, record.get(file.path.name)))
        record[file.path.name] = _entry(record.get(file.path.name), file, data, put)
    if files and not new:
        plan.changes.extend(_write_record(kit, record, files[0]))
    plan.changes.extend(files)
    return plan


def disable(kit: Kit) -> KitPlan:
    """Take out what `enable` has put in.

    Raises:
        KitError: the kit can't be read, or it is signed.
    """
    plan = KitPlan(kit)
    record = _read_record(kit)
    if not record:
        return plan
    _refuse_signed(kit)
    after: list[Change] = []
    for name, entry in record.items():
        path, backup = kit.local / name, kit.local / f"{name}{BACKUP}"
        original = read(backup).data if backup.exists() else None
        if not path.exists():
            plan.notes.append(f"{path} is not there any more")
            continue
        file = read(path)
        data = _without(file, entry, original, plan.notes)
        if data != file.data:
            plan.changes.append(Change(path, file.data, data))
        if original is not None and data == original:
            after.append(Change(backup, original, None, told=False))
        elif original is not None:
            plan.notes.append(f"the original stays in {backup}, as {path} has been changed by others since")
    _, record_file = _record_file(kit)
    plan.changes.extend([Change(kit.local / RECORD, record_file, None, told=False), *after])
    return plan


def _without(file: JsonFile, entry: _Entry, original: bytes | None, notes: list[str]) -> bytes | None:
    """What is to be in a file; None if it is to be removed."""
    if _sum(file.data) == entry.after and entry.before == _sum(original):
        return original
    content, kept = take_out(file.content, entry.put)
    notes.extend(f"{file.path}: {each}" for each in kept)
    if not content and not entry.existed:
        return None
    return file.data if content == file.content else file.with_content(content)


def _refuse_signed(kit: Kit) -> None:
    if (signature := kit.signed) is not None:
        raise KitError(
            "SIGNED_KIT",
            f"{kit.local} is signed by {signature}, so that nothing in it may be changed or added",
            "set this when the kit is made (nvflare_rdma.provision.RdmaBuilder in project.yml), or in the environment "
            "of the site's processes (NVFLARE_RDMA_...)",
        )


def _check_settings(path: Path, content: Mapping[str, Any]) -> None:
    try:
        settings_in(content)
    except ConfigError as error:
        raise KitError("INVALID_SETTING", f"{path}: {error}", "mend it there, and try again") from None


def _is_flares_port(kit: Kit, ports: str) -> bool:
    """Whether a door is asked for at FLARE's own port, and at no other."""
    first, last = port_range(ports)
    within = [port for port in kit.ports if first <= port <= last]
    if within and first < last:
        raise KitError(
            "INVALID_VALUE",
            f"data_port='{ports}': {kit.folder} has {within[0]} for FLARE's own connections",
            "take a range without it; with --upgrade-driver that port alone can be shared",
        )
    return bool(within)


def _check_shared(kit: Kit, path: Path, content: Mapping[str, Any], port: str) -> None:
    """Refuse a door at FLARE's own port where the driver is not going to have that port."""
    if not (settings_in(content).rdma_upgrade and kit.scheme in TCP):
        scheme = f"over {kit.scheme}" if kit.scheme else "by a scheme that is not told"
        raise KitError(
            "INVALID_VALUE",
            f"data_port='{port}': {kit.folder} has that port for FLARE's own connections, {scheme}",
            "take another port; with --upgrade-driver, a server whose scheme is tcp shares it",
        )
    if (known := content.get("rdma_data_ports")) is not None:
        raise KitError(
            "INVALID_VALUE",
            f"data_port='{port}': FLARE's own port is shared only without rdma_data_ports, and {path} has {known!r}",
            "take it out there, or with `nvflare-rdma disable`",
        )


def _keep_original(file: JsonFile, known: _Entry | None) -> list[Change]:
    backup = file.path.with_name(file.path.name + BACKUP)
    if file.data is None or known is not None or backup.exists():
        return []  # there is none, or the first one is never overwritten
    return [Change(backup, None, file.data, file.path, told=False)]


def _entry(known: _Entry | None, file: JsonFile, data: bytes, put: Put) -> _Entry:
    if known is None:
        return _Entry(_sum(file.data), _sum(data), file.data is not None, put)
    # It is as it was put there, or was never put there since something broke off; else others have changed it.
    before = known.before if _sum(file.data) in (known.after, known.before) else ""
    return _Entry(before, _sum(data), known.existed, known.put.followed_by(put, file.content))


def _sum(data: bytes | None) -> str:
    """Of a file's content; that of a file which does not exist is "none"."""
    return "none" if data is None else hashlib.sha256(data).hexdigest()


def _record_file(kit: Kit) -> tuple[dict[str, Any], bytes | None]:
    file = kit.local / RECORD
    if not file.exists():
        return {}, None
    found = read(file)
    return found.content, found.data


def _read_record(kit: Kit) -> dict[str, _Entry]:
    content, _ = _record_file(kit)
    try:
        if content and content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r} is not known")
        return {
            str(name): _Entry(entry["before"], entry["after"], entry["existed"], Put.of(entry["put"]))
            for name, entry in content.get("files", {}).items()
        }
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise KitError(
            "BAD_RECORD",
            f"{kit.local / RECORD} can't be understood ({type(error).__name__}: {error})",
            f"take it away; what was put into {COMM_CONFIG} is then the operator's own",
        ) from None


def _write_record(kit: Kit, record: Mapping[str, _Entry], sample: Change) -> list[Change]:
    _, before = _record_file(kit)
    files = {
        name: {"before": entry.before, "after": entry.after, "existed": entry.existed, "put": entry.put.as_json()}
        for name, entry in record.items()
    }
    content = {"what": "what `nvflare-rdma enable` has put into the files beside this one", "version": _VERSION}
    data = (json.dumps({**content, "files": files}, indent=4) + "\n").encode()
    like = sample.path if sample.before is not None else sample.like
    return [Change(kit.local / RECORD, before, data, like, told=False)] if data != before else []
