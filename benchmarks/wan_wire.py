"""The emulated WAN of `wan.py`: the veth pair of the test guest (tests/guest/network.sh), slowed and made lossy by tc.

    vb 10.8.0.2, rxb (sender)  --- RTT/2, loss, then 100 Mbit/s behind a queue of 1.25 MB --->  va 10.8.0.1, rxa
                               <-- RTT/2 ----------------------------------------------------

netem delays and loses packets; a tbf behind it limits the rate. netem's own rate limit would do as well, but its queue
is counted in packets, and packets of verbs and of TCP differ in size; and a packet that tbf drops was taken from the
sender before, so its TCP does not learn of it sooner than it would from a router.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import wait_until

RECEIVER, SENDER = "10.8.0.1", "10.8.0.2"
RECEIVER_LINK, SENDER_LINK = "va", "vb"
RATE = 100e6 / 8  # bytes/s
QUEUE = 1_250_000  # bytes: 100 ms, more than the bandwidth-delay product at 80 ms
#: Payload of a full packet on a link with an MTU of 9000: TCP with timestamps, and the path MTU of rxe.
TCP_PAYLOAD, VERBS_PAYLOAD = 9000 - 20 - 32, 4096
_RMEM = Path("/proc/sys/net/ipv4/tcp_rmem")
_GUEST = Path("/run/guest/command")
_DELAYED = 100_000  # packets that netem may hold
_TABLE = 101  # of routes from the receiver, see network.sh


@dataclass(frozen=True)
class Counters:
    """Of packets that the sender gave to its interface: all, lost at random, dropped because the queue was full."""

    packets: int
    lost: int
    overflowed: int

    def since(self, before: Counters) -> Counters:
        return Counters(self.packets - before.packets, self.lost - before.lost, self.overflowed - before.overflowed)


def refuse_outside_guest() -> None:
    if not _GUEST.exists():
        raise SystemExit("refused: it slows this machine's network, and this machine is no test guest; use --guest")


class Wire:
    def __init__(self) -> None:
        self._rtt = 0.0
        # One for all of the run: to start a process is slow on an emulated CPU.
        self._tc = subprocess.Popen(
            ["tc", "-s", "-j", "-batch", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        # As network.sh leaves them, but packets are packets: no segmentation after they are counted.
        for link in (RECEIVER_LINK, SENDER_LINK):
            _run("ip", "link", "set", link, "gso_max_segs", "1")
        # What one connection learns of the path is not for the next.
        Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")

    def set(self, rtt: float, loss: float) -> None:
        """``rtt`` in ms, ``loss`` of data packets in %."""
        self._rtt = rtt
        self._batch(
            f"qdisc replace dev {SENDER_LINK} root handle 1: netem delay {rtt / 2}ms loss {loss}% limit {_DELAYED}",
            f"qdisc replace dev {SENDER_LINK} parent 1:1 handle 10: tbf rate {RATE * 8:.0f} burst 32kb limit {QUEUE}",
            f"qdisc replace dev {RECEIVER_LINK} root handle 1: netem delay {rtt / 2}ms limit {_DELAYED}",
        )

    def lose(self, data: float, answers: float) -> None:
        """Change the loss (%) of packets from the sender and to it, and nothing else."""
        self._batch(
            *(
                f"qdisc change dev {link} root handle 1: netem delay {self._rtt / 2}ms loss {loss}% limit {_DELAYED}"
                for link, loss in ((SENDER_LINK, data), (RECEIVER_LINK, answers))
            )
        )

    def disturb(self, how: str) -> None:
        """Begin one of `wan_cells.DISTURBANCES`."""
        match how:
            case "5 % loss":
                self.lose(5, 0)
            case "path outage":
                self.lose(100, 100)
            case "link down":
                _run("ip", "link", "set", RECEIVER_LINK, "down")

    def restore(self, how: str) -> None:
        if how != "link down":
            self.lose(0, 0)
            return
        # Routes and neighbours are gone with the link.
        mac = Path(f"/sys/class/net/{SENDER_LINK}/address").read_text().strip()
        commands = (
            f"link set {RECEIVER_LINK} up",
            f"route replace {SENDER} dev {RECEIVER_LINK} src {RECEIVER} table {_TABLE}",
            f"neighbour replace {SENDER} lladdr {mac} dev {RECEIVER_LINK} nud permanent",
        )
        _run("ip", "-batch", "-", given="".join(f"{command}\n" for command in commands))

    def counters(self) -> Counters:
        netem, tbf = (q for q in self._batch() if q["kind"] in ("netem", "tbf"))
        # What tbf drops is in netem's count too.
        return Counters(netem["packets"] + netem["drops"] + netem["qlen"], netem["drops"] - tbf["drops"], tbf["drops"])

    def settle(self) -> None:
        """Wait until what the last cell left is through."""
        wait_until(lambda: not any(q["qlen"] for q in self._batch()), "the wire to be empty")

    def ping(self, count: int = 5) -> float:
        """The median round trip in ms, as a check. 0 if nothing came back."""
        command = ["busybox", "ping", "-c", str(count), "-W", "1", "-I", SENDER, RECEIVER]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        times = sorted(float(text) for text in re.findall(r"time=([0-9.]+)", result.stdout))
        return times[len(times) // 2] if times else 0.0

    def _batch(self, *commands: str) -> list[dict[str, Any]]:
        """Have tc do that, and show what there is then."""
        assert self._tc.stdin is not None
        assert self._tc.stdout is not None
        self._tc.stdin.write("".join(f"{line}\n" for line in (*commands, f"qdisc show dev {SENDER_LINK}")))
        self._tc.stdin.flush()
        if not (answer := self._tc.stdout.readline()):
            raise SystemExit(f"tc refused one of {commands}")
        return list(json.loads(answer))


def facts() -> dict[str, Any]:
    """Of the wire and of TCP, for the results' header."""
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return {"rate": RATE, "queue": QUEUE, "congestion": congestion, "rmem": _RMEM.read_text().split()}


def arrived() -> int:
    """Bytes that came to the receiver's interface, headers and copies included."""
    return int(Path(f"/sys/class/net/{RECEIVER_LINK}/statistics/rx_bytes").read_text())


def cpu_times() -> tuple[int, int]:
    """(idle, all) since the start, in ticks: the emulated CPU has to be idle for a part of every cell."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)


def _run(*command: str, given: str = "") -> str:
    result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=30, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} {given!r} ended with {result.returncode}: {result.stderr.strip()}")
    return result.stdout
