"""Hosts that are network namespaces, and wires between them with a rate, a delay, losses and a finite queue (`wire.c`).

It works in a process that `apart` has started: as root of namespaces of its own, which end with it and all that it has
started, so nothing is left of them. It takes no rights of root outside, but /dev/net/tun and a C compiler.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: As root of networks, a view of the file system and processes of its own, which all end with this process.
APART = [
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL"),
    *("--mount-proc", "--", "env", "WIRES_APART=1"),
]
_SOURCE = Path(__file__).with_name("wire.c")
#: What all hosts can reach each other by: the centre of a star has .1, the others .2 and so on.
_NETWORK = "10.91.0"
_ALL = f"{_NETWORK}.0/24"
CENTRE = f"{_NETWORK}.1"
#: What a device holds until the wire takes it: none is dropped there, where nobody would count it.
_DEVICE_PACKETS = 10_000
_CLONE_NEWNET = 0x40000000


def apart(*command: str) -> list[str]:
    """`command`, to be run where there can be a `Star`."""
    return [*APART, *command]


def is_apart() -> bool:
    """Whether this process may have a `Star`."""
    return "WIRES_APART" in os.environ


def go_apart(*command: str) -> None:
    """Run `command` where there can be a `Star`, in place of this process; end it, with the reason, where there can be
    none."""
    if reason := why_not():
        sys.exit(f"no wires here: {reason}")
    os.execvp(APART[0], apart(*command))


def why_not() -> str:
    """Why there can be no wires here; empty if there can."""
    for program, package in (("gcc", "gcc"), ("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"there is no {program} (package {package})"
    made = "ip tuntap add dev probe mode tun && mount --bind /etc/hosts /etc/hosts"
    try:
        done = subprocess.run(apart("sh", "-c", made), capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return str(error)
    return f"namespaces and TUN devices can't be made: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True)
class Link:
    """What a wire is like, in both directions; the keys of `wire.c`."""

    rate: float = 1000.0  # Mbit/s
    delay: float = 0.0  # ms, one way
    loss: float = 0.0  # %
    burst: float = 1.0  # packets lost in a row, on average
    queue: float = 100.0  # ms
    mtu: int = 1500
    seed: int = 1


@dataclass(frozen=True)
class Count:
    """Packets and bytes of one direction, by what became of them."""

    carried: tuple[int, int]
    lost: tuple[int, int]
    dropped: tuple[int, int]
    blocked: tuple[int, int]

    def __sub__(self, before: Count) -> Count:
        def less(name: str) -> tuple[int, int]:
            now, then = getattr(self, name), getattr(before, name)
            return now[0] - then[0], now[1] - then[1]

        return Count(*(less(field.name) for field in fields(Count)))

    @property
    def sent(self) -> int:
        """Bytes that were put on the wire, whether they came to its end or not."""
        return self.carried[1] + self.lost[1]

    @property
    def packets(self) -> int:
        return self.carried[0] + self.lost[0] + self.dropped[0] + self.blocked[0]


@dataclass(frozen=True)
class Packet:
    """A line of a wire's trace."""

    direction: int  # 0: from the wire's first host
    came: int  # ns of the monotonic clock
    due: int  # ns, at the other end; 0 if it was never put on the wire
    length: int
    fate: str
    protocol: int
    source: int
    target: int
    flags: int
    payload: int

    @classmethod
    def read(cls, line: str) -> Packet:
        parts: list[Any] = line.split()
        return cls(*(part if index == 4 else int(part) for index, part in enumerate(parts)))


class Wire:
    """A wire between two namespaces. Its counters are of both directions: from the first one, and back."""

    def __init__(self, program: Path, ends: Sequence[tuple[Path, str]], link: Link, trace: Path | None) -> None:
        self._trace = trace
        keys = asdict(link) | ({"trace": trace} if trace else {})
        places = [str(part) for end in ends for part in end]
        command = [str(program), *places, *(f"{key}={value}" for key, value in keys.items())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("up")

    @property
    def pid(self) -> int:
        return self._process.pid

    def count(self) -> list[Count]:
        return self._tell("")

    def set(self, **keys: object) -> list[Count]:
        """Change `loss`, `burst`, or what the firewall lets through (`open`, a list of ports)."""
        for key, value in keys.items():
            self._tell(f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}")
        return self.count()

    def packets(self) -> Iterator[Packet]:
        """What has come to the wire until now, by each direction's time."""
        assert self._trace is not None
        self.count()  # it writes down what it has
        with open(self._trace) as file:
            yield from map(Packet.read, file)

    def cut(self) -> None:
        """End the wire, and with it the devices at its ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def _tell(self, text: str) -> list[Count]:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        both: list[dict[str, list[int]]] = json.loads(self._answer("["))
        return [Count(**{key: (value[0], value[1]) for key, value in one.items()}) for one in both]

    def _answer(self, begin: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(begin):
            raise RuntimeError(f"the wire said {line!r} and ended with {self._process.wait(timeout=10)}")
        return line


class Star:
    """A host in the centre and others around it, each joined to it by a wire of its own. All reach each other, and find
    each other's names in /etc/hosts. Each wire has the congestion control that is asked for, whatever this machine's
    is."""

    def __init__(self, folder: Path, centre: str, congestion: str = "cubic") -> None:
        if not is_apart():
            raise RuntimeError("it would change this machine's own network and /etc/hosts: run it by `apart`")
        self._folder = folder
        self._congestion = congestion
        self._centre = centre
        self._program = folder / "wire"
        self.wires: dict[str, Wire] = {}
        self._addresses = {centre: CENTRE}
        self._hosts = folder / "hosts"
        folder.mkdir(parents=True, exist_ok=True)
        _run("gcc", "-O2", "-pthread", "-o", str(self._program), str(_SOURCE))
        self._hosts.write_text(f"127.0.0.1 localhost\n{CENTRE} {centre}\n")
        _run("mount", "--bind", str(self._hosts), "/etc/hosts")
        self._add_host(centre)
        _run(*self.on(centre, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"))
        self._ip(centre, f"address add {CENTRE}/32 dev lo")

    def join(self, name: str, link: Link, trace: Path | None = None) -> Wire:
        """Add a host, and a wire from the centre to it: direction 0 is from the centre."""
        address = self._addresses[name] = f"{_NETWORK}.{len(self.wires) + 2}"
        with open(self._hosts, "a") as hosts:
            hosts.write(f"{address} {name}\n")
        self._add_host(name)
        ends = [(self._file(self._centre), name), (self._file(name), "wire")]
        wire = self.wires[name] = Wire(self._program, ends, link, trace)
        self._ip(name, f"address add {address}/32 dev wire")
        for host, device in ((self._centre, name), (name, "wire")):
            # Without IPv6, of which a host would send packets of its own accord.
            self._ip(host, f"link set {device} addrgenmode none txqueuelen {_DEVICE_PACKETS}", f"link set {device} up")
        self._route(name, address)
        return wire

    def address(self, name: str) -> str:
        return self._addresses[name]

    def on(self, name: str, *command: str) -> list[str]:
        """`command`, to be run on that host."""
        return ["nsenter", f"--net={self._file(name)}", "--", *command]

    def processes(self, name: str) -> list[int]:
        """The processes of a host."""
        found, network = [], self._file(name).stat().st_ino
        wires = {str(wire.pid) for wire in self.wires.values()}  # their threads are in both of the hosts that they join
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name not in wires:
                with suppress(OSError):  # it has ended
                    if (entry / "ns" / "net").stat().st_ino == network:
                        found.append(int(entry.name))
        return found

    def move(self, name: str) -> None:
        """Give a host another address; the old one is gone, and so is what was connected to it."""
        old, new = self._addresses[name], f"{_NETWORK}.{100 + int(self._addresses[name].rpartition('.')[2])}"
        self._addresses[name] = new
        self._hosts.write_text(self._hosts.read_text().replace(f"{old} {name}\n", f"{new} {name}\n"))
        self._ip(self._centre, f"route del {old}/32 dev {name}")
        self._ip(name, f"address del {old}/32 dev wire", f"address add {new}/32 dev wire")
        self._route(name, new)

    def close(self) -> None:
        """End the wires, and let go of the networks."""
        for wire in self.wires.values():
            wire.cut()
        _run("umount", "/etc/hosts", *(str(self._file(name)) for name in self._addresses))

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """The network of this thread, and of the sockets that it makes, is that host's."""
        with open("/proc/thread-self/ns/net") as own, open(self._file(name)) as host:
            _set_network(host.fileno())
            try:
                yield
            finally:
                _set_network(own.fileno())

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.net"

    def _route(self, name: str, address: str) -> None:
        for host, device, own, to in ((self._centre, name, CENTRE, f"{address}/32"), (name, "wire", address, _ALL)):
            self._ip(host, f"route replace {to} dev {device} src {own} congctl {self._congestion}")

    def _add_host(self, name: str) -> None:
        self._file(name).touch()
        _run("unshare", f"--net={self._file(name)}", "ip", "link", "set", "lo", "up")

    def _ip(self, name: str, *commands: str) -> None:
        _run(*self.on(name, "ip", "-batch", "-"), given="\n".join(commands))


def _set_network(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str, given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} {given!r} ended with {done.returncode}: {done.stderr.strip()}")


if __name__ == "__main__":  # wire.py COMMAND...: run it apart
    go_apart(*sys.argv[1:])
