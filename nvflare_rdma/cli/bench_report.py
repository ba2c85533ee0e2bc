"""What a bench is asked for, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1024 * 1024
RAW = "raw tcp"


@dataclass(frozen=True)
class Asked:
    """What is to be measured: each of these with each other one. None is what the settings say.

    Attributes:
        fabrics: by name; empty for all that both sides can use.
        rails: the most tcp rails of a link.
        chunks: bytes of a chunk.
        codecs: by name, or `EXACT`.
        sizes: bytes of what is moved at once.
        repeat: how often each size is moved in each direction.
    """

    fabrics: tuple[str, ...]
    rails: tuple[int | None, ...]
    chunks: tuple[int | None, ...]
    codecs: tuple[str, ...]
    sizes: tuple[int, ...]
    repeat: int


@dataclass(frozen=True)
class Figure:
    """What one size of one kind of link took.

    Attributes:
        fabric: its name, or `RAW`.
        rails: how many tcp rails, or plain connections, were open; 1 for shared memory.
        most_rails, chunk_bytes: what was asked for, None for what the settings say.
        to_peer, from_peer: bytes a second, the medians; bytes count as they are in memory, whatever the codec.
        cpu_seconds, peer_cpu_seconds: of this process and of the peer's, for each 10^9 bytes of both directions.
        peak_bytes, peer_peak_bytes: the most memory that the processes had meanwhile.
    """

    fabric: str
    rails: int
    most_rails: int | None
    chunk_bytes: int | None
    codec: str
    size_bytes: int
    repeat: int
    to_peer: float
    from_peer: float
    cpu_seconds: float
    peer_cpu_seconds: float
    peak_bytes: int
    peer_peak_bytes: int

    @property
    def rate(self) -> float:
        """Bytes a second of both directions, one after the other."""
        return 2 / (1 / self.to_peer + 1 / self.from_peer)


@dataclass(kw_only=True)
class BenchReport:
    """What a bench has found. `left_out` says what could not be measured, and why; `broke_off`, why nothing more was
    measured, or ""."""

    peer: str
    same_host: bool
    secure: bool
    site: str
    peer_site: str
    round_trip_seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broke_off: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    peer_versions: dict[str, str] = field(default_factory=dict)


class Steps:
    """Hears how a bench gets on; this one tells nobody."""

    def begin(self, count: int) -> None:
        """There are so many steps."""

    def step(self, what: str, count: int = 1) -> None:
        """So many steps are done, and `what` is next."""
