"""Which fabrics exist, which this process can use, and why not the others."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nvflare_rdma.errors import ConfigError, FabricUnavailable
from nvflare_rdma.fabric.base import Availability
from nvflare_rdma.fabric.verbs_devices import VerbsOptions, choose_gid, choose_ports, list_ports

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


def probe(verbs: VerbsOptions, budget: int) -> dict[str, Availability]:
    """What each fabric can do on this machine, best first, with the reason for what it can't.

    ``budget``: bytes that incoming messages may hold.
    """
    return {"verbs": _probe_verbs(verbs, budget), "shm": _probe_shm(), "tcp": Availability(True)}


def _probe_verbs(options: VerbsOptions, budget: int) -> Availability:
    try:
        ports = choose_ports(list_ports(), options)
        names = [f"{port}, {choose_gid(port, options)[0]}" for port in ports]
    except FabricUnavailable as error:
        return Availability(False, str(error))
    # Not at the top: it needs numpy, as below.
    from nvflare_rdma.fabric.verbs_memory import memlock_reason

    reason = pyverbs_reason() or device_files_reason() or memlock_reason(budget)
    return Availability(not reason, reason, "" if reason else "; ".join(names))


def pyverbs_reason() -> str:
    """Why pyverbs can't be used by this Python; "" if it can."""
    try:
        importlib.import_module("nvflare_rdma.fabric.verbs_import")
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        if importlib.util.find_spec("pyverbs") is None:
            return (
                "pyverbs is not installed for this Python: apt install python3-pyverbs (it is not on PyPI), and make "
                "the virtual environment with --system-site-packages"
            )
        return (
            f"pyverbs can't be loaded by Python {version}: {error}. The distribution's package is for the "
            "distribution's own Python: use that"
        )
    return ""


def device_files_reason() -> str:
    """Why this process can't open an RDMA device; "" if it can."""
    files = sorted(Path("/dev/infiniband").glob("uverbs*"))
    if not files:
        return (
            "there is no /dev/infiniband/uverbs*: `modprobe ib_uverbs`, or give the container the devices "
            "(docker: --device /dev/infiniband)"
        )
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        return f"no permission for {files[0]}: is this user in the group rdma?"
    return ""


def _probe_shm() -> Availability:
    if sys.platform != "linux":
        return Availability(False, f"shared memory between processes needs Linux, not {sys.platform}")
    # Not at the top: it needs numpy, which the command line's simple commands do without.
    from nvflare_rdma.fabric.process_memory import unusable_reason

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
