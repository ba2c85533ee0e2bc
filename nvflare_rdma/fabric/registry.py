"""Which fabrics exist, which of them this process can use, and which one two processes use together.

A fabric is a module or a folder of `nvflare_rdma.fabric` with two functions, and a line in `FABRICS`:

    probe(options)      whether this process can use the fabric, and if not, why
    factory(options)    a function that makes the `Fabric` of one link; what it shares between links is made once
"""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.base import Fabric
from nvflare_rdma.fabric.options import Availability, FabricOptions

#: Name -> module, the best fabric first. Each is tried in this order unless the `rdma_fabrics` setting gives another.
FABRICS = {
    "verbs": "nvflare_rdma.fabric.verbs",
    "shm": "nvflare_rdma.fabric.shm",
    "tcp": "nvflare_rdma.fabric.tcp",
}


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """What a fabric may know of the link that it is made for: this side's address on the control stream, how to dial
    the peer's port once more (None on the passive side), and how many rails there may be (None: as settings say)."""

    local_address: str = ""
    dial: Callable[[], socket.socket] | None = None
    most_rails: int | None = None


FabricFactory: TypeAlias = Callable[[LinkEnd], Fabric]


def probe(options: FabricOptions) -> dict[str, Availability]:
    """What each fabric can do on this machine, the best one first, with the reason for what it can't do."""
    return {name: importlib.import_module(module).probe(options) for name, module in FABRICS.items()}


def factories(options: FabricOptions, available: Mapping[str, Availability]) -> dict[str, FabricFactory]:
    """What makes the fabrics of links, for the fabrics that this process can use. To be called once per process."""
    usable = [name for name, state in available.items() if state.usable]
    return {name: importlib.import_module(FABRICS[name]).factory(options) for name in usable}


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


def choose(
    order: Sequence[str],
    own: Mapping[str, str],
    peer: Mapping[str, str],
    same_host: bool,
    need_same_host: Collection[str] = (),
) -> tuple[str, str]:
    """Return the first fabric in `order` that both sides can use ("" if there is none), and why the better ones were
    passed over.

    `own` and `peer` map names to the reason why not, "" for usable. `same_host` says that the two sides have the same
    `host_identity`, and it is not "". `need_same_host` names the fabrics that work on one host only.
    """
    passed: list[str] = []
    for name in order:
        reason = own.get(name, "not asked for")
        if not reason:
            reason = f"peer: {peer[name]}" if peer.get(name) else ("" if name in peer else "peer does not offer it")
        if not reason and name in need_same_host and not same_host:
            reason = "different host (or container network)"
        if not reason:
            return name, "; ".join(passed)
        passed.append(f"{name}: {reason}")
    return "", "; ".join(passed)
