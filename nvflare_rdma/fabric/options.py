"""What a process's settings say to its fabrics, and what a fabric says to that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys")
DEVICE_FILES = Path("/dev/infiniband")


@dataclass(frozen=True, slots=True)
class VerbsOptions:
    """The settings of the verbs fabric.

    Rails are spread over `devices` (names, or name:port); () is the best one, which may be one that the kernel emulates
    if `software` says so. A queue pair sends again after 4.096 us * 2^`ack_timeout` without an answer (a device may
    wait up to four times as long), which has to be longer than the round trip; it fails after `retries`, of which 7 is
    without end for some devices.
    """

    devices: tuple[str, ...] = ()
    gid_index: int | None = None
    software: bool = False
    ack_timeout: int = 16
    retries: int = 6


@dataclass(frozen=True, slots=True)
class FabricOptions:
    """The settings that fabrics read. `rails` is the number of parallel connections to a peer, `budget` the bytes that
    incoming messages may hold, `congestion` the name of the kernel's congestion control ("" for the system's).
    `sysfs` and `device_files` are where the kernel shows RDMA devices."""

    rails: int = 2
    budget: int = 64 * 1024 * 1024
    congestion: str = ""
    verbs: VerbsOptions = field(default_factory=VerbsOptions)
    sysfs: Path = SYSFS
    device_files: Path = DEVICE_FILES


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether this process can use a fabric. `reason` says why not, and what would change that; `detail` says what the
    fabric would use if it can be used."""

    usable: bool
    reason: str = ""
    detail: str = ""
