"""Whether this process can use RDMA devices, and what would change that."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric.options import DEVICE_FILES, SYSFS, Availability, FabricOptions
from nvflare_rdma.fabric.verbs.devices import IWARP, choose_gid, choose_ports, device_file, list_ports
from nvflare_rdma.fabric.verbs.memlock import memlock_reason


def probe(options: FabricOptions) -> Availability:
    """See `nvflare_rdma.fabric.registry`. The detail names the ports and GIDs that would be used."""
    sysfs, files = options.sysfs, options.device_files
    try:
        ports = choose_ports(list_ports(sysfs), options.verbs)
        names = [f"{port}, {choose_gid(port, options.verbs)[0]}" for port in ports]
    except FabricUnavailable as error:
        return Availability(False, str(error))
    denied = [reason for port in ports if (reason := device_file_reason(port.device, sysfs, files))]
    if any(port.transport == IWARP for port in ports):
        denied += filter(None, [connection_manager_reason(files)])
    reason = pyverbs_reason() or "; ".join(denied) or memlock_reason(options.budget)
    return Availability(not reason, reason, "" if reason else "; ".join(names))


def pyverbs_reason() -> str:
    """Why pyverbs can't be used by this Python; "" if it can."""
    try:
        importlib.import_module("nvflare_rdma.fabric.verbs.pyverbs")
    except Exception as error:  # noqa: BLE001 - compiled modules that don't fit each other raise what they like
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        if importlib.util.find_spec("pyverbs") is None:
            return (
                f"pyverbs is not installed for this Python {version}: apt install python3-pyverbs (it is not on PyPI), "
                "and make the virtual environment with the distribution's Python and --system-site-packages"
            )
        return (
            f"pyverbs can't be loaded by Python {version}: {error!r}. The distribution's package is for the "
            "distribution's own Python: make the virtual environment with that"
        )
    return ""


def device_file_reason(device: str, sysfs: Path = SYSFS, files: Path = DEVICE_FILES) -> str:
    """Why this process can't open an RDMA device; "" if it can."""
    name = device_file(device, sysfs)
    if not name:
        return f"{device} can't be opened by programs: the kernel module ib_uverbs is not loaded (`modprobe ib_uverbs`)"
    reason = _open_reason(files / name, f"give it to the container (docker: --device {files})")
    return f"{device}: {reason}" if reason else ""


def connection_manager_reason(files: Path = DEVICE_FILES) -> str:
    """Why this process can't connect iWARP rails, which takes rdma_cm; "" if it can."""
    advice = f"`modprobe rdma_ucm`, and give it to the container (docker: --device {files})"
    return _open_reason(files / "rdma_cm", advice)


def _open_reason(file: Path, if_missing: str) -> str:
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {file}: {if_missing}"
    except OSError as error:
        advice = "do the container's device rules allow it (docker: --device /dev/infiniband)?"
        if error.errno == errno.EACCES:
            advice = f"it is {_permissions(file)}, this is user {os.geteuid()}: is that in the group rdma?"
        return f"{file} can't be opened: {error.strerror}; {advice}"
    return ""


def _permissions(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return "in a folder that may not be read"
    return f"mode {status.st_mode & 0o777:o} of user {status.st_uid} and group {status.st_gid}"
