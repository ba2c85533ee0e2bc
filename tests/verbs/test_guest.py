"""The guest in which the other tests of verbs run has the devices and wires that they count on."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE


def state(device: str) -> str:
    return (rdma_sysfs(device) / "ports/1/state").read_text()


def rdma_sysfs(device: str) -> Path:
    return Path("/sys/class/infiniband") / device


def sent_packets(link: str) -> int:
    return int(Path(f"/sys/class/net/{link}/statistics/tx_packets").read_text())


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=30 * PATIENCE)


def open_device(name: str) -> None:
    device = pytest.importorskip("pyverbs.device")
    with device.Context(name=name) as context:
        assert context.query_device().phys_port_cnt == 1


def datagram(source: str, destination: str) -> None:
    with (
        socket.socket(type=socket.SOCK_DGRAM) as receiver,
        socket.socket(type=socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((destination, 0))
        receiver.settimeout(10 * PATIENCE)
        sender.bind((source, 0))
        sender.sendto(b"to the other side", receiver.getsockname())
        assert receiver.recv(100) == b"to the other side"


def test_soft_roce_devices_are_up_and_open(devices: tuple[str, str], network: Path) -> None:
    assert devices == ("rxa", "rxb")
    for name in devices:
        assert "ACTIVE" in state(name)
        open_device(name)


def test_soft_iwarp_devices_are_up_and_open(iwarp_devices: tuple[str, str], network: Path) -> None:
    assert iwarp_devices == ("swa", "swb")
    for name in iwarp_devices:
        assert "ACTIVE" in state(name)
        open_device(name)


@pytest.mark.parametrize(("link", "other", "net"), [("va", "vb", "10.8.0"), ("vc", "vd", "10.8.1")])
def test_packets_cross_the_wire_both_ways(network: Path, link: str, other: str, net: str) -> None:
    if not Path("/sys/class/net", link).exists():
        pytest.skip("this kernel has no siw, so there is no wire for it")
    before = sent_packets(link), sent_packets(other)
    datagram(f"{net}.1", f"{net}.2")
    assert sent_packets(link) > before[0]
    datagram(f"{net}.2", f"{net}.1")
    assert sent_packets(other) > before[1]


def test_the_loopback_still_works(network: Path) -> None:
    datagram("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("ip link set va down", id="link down"),
        pytest.param("ip link delete vb", id="link deleted"),
        pytest.param("rdma link delete rxa", id="device deleted"),
        pytest.param("tc qdisc add dev va root netem loss 100%", id="nothing gets through"),
        pytest.param("ip rule delete pref 101", id="no way there"),
    ],
)
def test_what_a_test_broke_is_restored(network: Path, devices: tuple[str, str], damage: str) -> None:
    run(*damage.split())
    run("sh", network, "up")
    before = sent_packets("va")
    datagram("10.8.0.1", "10.8.0.2")
    assert sent_packets("va") > before
    for name in devices:
        assert "ACTIVE" in state(name)
        open_device(name)
