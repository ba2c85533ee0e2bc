"""Which fabrics exist, which this process can use, and why not the others."""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_rdma.errors import ConfigError, FabricUnavailable
from nvflare_rdma.fabric.memlock import memlock_reason
from nvflare_rdma.fabric.verbs_devices import (
    DEVICE_FILES,
    IWARP,
    SYSFS,
    VerbsOptions,
    choose_gid,
    choose_ports,
    device_file,
    list_ports,
)

#: Best first. Each is tried in this order unless the `rdma_fabrics` setting gives another.
FABRICS = ("verbs", "shm", "tcp")


def parse_fabrics(value: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in order.

    Raises:
        ConfigError: a name is unknown, or the list is empty.
    """
    names = tuple(part.strip().lower() for part in value.split(",") if part.strip())
    unknown = [name for name in names if name not in FABRICS]
    if unknown or not names:
        raise ConfigError(
            f"rdma_fabrics={value!r}: {'unknown fabric ' + repr(unknown[0]) if unknown else 'no fabric named'}. "
            f"Allowed: a comma-separated list of {', '.join(FABRICS)}."
        )
    return names


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a fabric can be used by this process. ``reason`` says why not, and what would change that; ``detail``,
    if it can, what it would use."""

    usable: bool
    reason: str = ""
    detail: str = ""


def probe(verbs: VerbsOptions, budget: int, sysfs: Path = SYSFS, files: Path = DEVICE_FILES) -> dict[str, Availability]:
    """What each fabric can do on this machine, best first, with the reason for what it can't.

    ``budget``: bytes that incoming messages may hold.
    """
    return {"verbs": _probe_verbs(verbs, budget, sysfs, files), "shm": _probe_shm(), "tcp": Availability(True)}


def _probe_verbs(options: VerbsOptions, budget: int, sysfs: Path, files: Path) -> Availability:
    try:
        ports = choose_ports(list_ports(sysfs), options)
        names = [f"{port}, {choose_gid(port, options)[0]}" for port in ports]
    except FabricUnavailable as error:
        return Availability(False, str(error))
    denied = [reason for port in ports if (reason := device_file_reason(port.device, sysfs, files))]
    if any(port.transport == IWARP for port in ports):
        denied += filter(None, [connection_manager_reason(files)])
    reason = pyverbs_reason() or "; ".join(denied) or memlock_reason(budget)
    return Availability(not reason, reason, "" if reason else "; ".join(names))


def pyverbs_reason() -> str:
    """Why pyverbs can't be used by this Python; "" if it can."""
    try:
        importlib.import_module("nvflare_rdma.fabric.verbs_import")
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


def _probe_shm() -> Availability:
    if sys.platform != "linux":
        return Availability(False, f"shared memory between processes needs Linux, not {sys.platform}")
    try:
        # Not at the top: it needs numpy, which the command line does without.
        from nvflare_rdma.fabric.process_memory import unusable_reason
    except ImportError as error:
        return Availability(False, f"numpy can't be loaded: {error}: install nvflare-rdma again")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind("")  # Linux picks a free abstract name (autobind, unix(7))
    except OSError as error:
        return Availability(False, f"abstract Unix sockets are forbidden in this process: {error} (seccomp, AppArmor)")
    reason = unusable_reason()
    return Availability(not reason, reason)


def host_identity() -> str:
    """Equal in two processes that can use shared memory together; "" if this can't be told (equal to nobody's).

    The same boot of the same kernel, the same network namespace (abstract sockets live in one), the same PID
    namespace (else the processes can't name each other) and the same user.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid")]
    except OSError:
        return ""
    # Hashed: it goes to the peer, which need not know more than whether it is equal to its own.
    return hashlib.sha256(f"nvflare-rdma {boot} {namespaces} {os.geteuid()}".encode()).hexdigest()[:32]


def choose(order: Sequence[str], own: Mapping[str, str], peer: Mapping[str, str], same_host: bool) -> tuple[str, str]:
    """The first fabric in ``order`` that both sides can use, and why the better ones were passed over.

    ``own`` and ``peer`` map names to the reason why not, "" for usable. ``same_host``: the two sides have the same
    `host_identity`, and it is not "". The name is "" if there is none.
    """
    passed: list[str] = []
    for name in order:
        reason = own.get(name, "not asked for")
        if not reason:
            reason = f"peer: {peer[name]}" if peer.get(name) else ("" if name in peer else "peer does not offer it")
        if not reason and name == "shm" and not same_host:
            reason = "different host (or container network)"
        if not reason:
            return name, "; ".join(passed)
        passed.append(f"{name}: {reason}")
    return "", "; ".join(passed)
