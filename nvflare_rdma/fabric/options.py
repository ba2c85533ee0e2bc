"""What a process's settings say to its fabrics, and what a fabric says to that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys")
DEVICE_FILES = Path("/dev/infiniband")


@dataclass(frozen=True, slots=True)
class VerbsOptions:
    """`devices`: names, or name:port, that rails are spread over; () for the best one. `software`: it may be one
    that the kernel emulates. `ack_timeout`: 4.096 us * 2^n without an answer, then a queue pair sends again (a device
    may wait up to four times as long); it has to be longer than the round trip. `retries`: so often before it fails;
    7 is without end for some devices."""

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
