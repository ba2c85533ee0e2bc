"""Which fabrics exist, which this process can use, and why not the others."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.fabric.base import Availability

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


def probe() -> dict[str, Availability]:
    """What each fabric can do on this machine, best first, with the reason for what it can't."""
    return {"verbs": _probe_verbs(), "shm": _probe_shm(), "tcp": Availability(True)}


def _probe_verbs() -> Availability:
    if importlib.util.find_spec("pyverbs") is None:
        return Availability(
            False, "pyverbs is not installed for this Python (apt install python3-pyverbs; not from PyPI)"
        )
    if not os.path.isdir("/dev/infiniband"):
        return Availability(False, "no RDMA device: /dev/infiniband does not exist")
    return Availability(False, "an RDMA device is present, but this release has no verbs fabric yet")


def _probe_shm() -> Availability:
    return Availability(False, "this release has no shared-memory fabric yet")


def choose(order: Sequence[str], own: Mapping[str, str], peer: Mapping[str, str], same_host: bool) -> tuple[str, str]:
    """The first fabric in ``order`` that both sides can use, and why the better ones were passed over.

    ``own`` and ``peer`` map names to the reason why not, "" for usable. The name is "" if there is none.
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
