from __future__ import annotations

import ipaddress
import os

import pytest

from nvflare_rdma.errors import FabricUnavailable
from nvflare_rdma.fabric.options import VerbsOptions
from nvflare_rdma.fabric.verbs.devices import Gid, PortInfo, choose_gid, choose_ports, device_file, list_ports
from tests.support.fake_sysfs import PCI, FakeSysfs

#: The table of a ConnectX port with two IPv4 networks and global IPv6, one address of which was removed.
MLX5_GIDS = {
    0: ("fe80::bace:f6ff:fe00:1", "IB/RoCE v1", "eth0"),
    1: ("fe80::bace:f6ff:fe00:1", "RoCE v2", "eth0"),
    2: ("192.0.2.7", "IB/RoCE v1", "eth0"),
    3: ("192.0.2.7", "RoCE v2", "eth0"),
    6: ("2001:db8::7", "IB/RoCE v1", "eth0.5"),
    7: ("2001:db8::7", "RoCE v2", "eth0.5"),
    150: ("198.51.100.7", "RoCE v2", "eth0.9"),
}


@pytest.fixture
def sysfs(tmp_path):
    return FakeSysfs(tmp_path)


def ports(sysfs):
    return list_ports(sysfs.root)


# -- list_ports --------------------------------------------------------------------------------------------


def test_a_machine_without_rdma_has_no_ports(sysfs):
    assert ports(sysfs) == []


def test_a_roce_port_and_every_gid_of_its_table_behind_any_hole(sysfs):
    sysfs.device("mlx5_0")
    sysfs.port("mlx5_0", gids=MLX5_GIDS, table=256)
    (port,) = ports(sysfs)
    assert (port.device, port.number, port.transport, port.software) == ("mlx5_0", 1, "RoCE", False)
    assert (port.state, port.active, port.rate) == ("ACTIVE", True, "100 Gb/sec")
    assert [gid.index for gid in port.gids] == list(MLX5_GIDS)
    assert [str(gid.address) for gid in port.gids] == [address for address, _, _ in MLX5_GIDS.values()]
    assert [gid.kind for gid in port.gids] == ["RoCE v1", "RoCE v2"] * 3 + ["RoCE v2"]
    assert [gid.netdev for gid in port.gids] == ["eth0"] * 4 + ["eth0.5"] * 2 + ["eth0.9"]
    assert port.gids[3].family == "RoCE v2 over IPv4"
    assert port.gids[5].family == "RoCE v2 over IPv6"
    assert str(port.gids[3]) == "GID 3 (RoCE v2, 192.0.2.7 on eth0)"


def test_an_infiniband_port(sysfs):
    sysfs.device("ib0")
    gids = {0: ("fe80::2:c903:1:1", "IB/RoCE v1", "")}
    sysfs.port("ib0", gids=gids, link_layer="InfiniBand", rate="200 Gb/sec (4X HDR)")
    (port,) = ports(sysfs)
    assert (port.transport, port.software) == ("InfiniBand", False)
    assert (port.gids[0].kind, port.gids[0].family) == ("IB", "InfiniBand")
    assert str(port.gids[0]) == "GID 0 (IB, fe80::2:c903:1:1)"


def test_soft_roce_is_software_wherever_it_is_found(sysfs):
    sysfs.rxe()
    sysfs.device("rxe_pci", parent="eth0")
    sysfs.port("rxe_pci")
    assert [(port.device, port.transport, port.software) for port in ports(sysfs)] == [
        ("rxa", "RoCE", True),
        ("rxe_pci", "RoCE", True),
    ]
    assert str(ports(sysfs)[0]) == "rxa port 1 (software RoCE, 10 Gb/sec)"


@pytest.mark.parametrize("folder", ["devices/virtual/infiniband", PCI], ids=["Linux 6.12", "before Linux 6.11"])
def test_soft_iwarp_is_software_wherever_it_is_found(sysfs, folder):
    sysfs.siw(folder=folder)
    (port,) = ports(sysfs)
    assert (port.transport, port.software, port.refusal) == ("iWARP", True, "")


def test_an_adapter_without_reliable_connections_is_called_what_the_kernel_calls_it(sysfs):
    sysfs.device("efa_0", "7: unspecified")
    sysfs.port("efa_0", link_layer="Unspecified", gids={0: ("fe80::1", "IB/RoCE v1", "")})
    (port,) = ports(sysfs)
    assert port.transport == "unspecified"
    with pytest.raises(
        FabricUnavailable, match=r"no RDMA device can be used: efa_0 port 1 .* has no reliable connections \(RC\)"
    ):
        choose_ports([port], VerbsOptions())
    with pytest.raises(FabricUnavailable, match=r"rdma_device=efa_0: efa_0 port 1 .* has no reliable connections"):
        choose_ports([port], VerbsOptions(("efa_0",)))


def test_ports_come_in_the_order_of_numbers(sysfs):
    sysfs.device("mlx4_0")
    for number in (10, 2, 1):
        sysfs.port("mlx4_0", number)
    assert [port.number for port in ports(sysfs)] == [1, 2, 10]


def test_a_port_that_is_down(sysfs):
    sysfs.device("mlx5_0")
    sysfs.port("mlx5_0", state="1: DOWN")
    (port,) = ports(sysfs)
    assert (port.state, port.active) == ("DOWN", False)


def test_files_that_cannot_be_read_count_as_empty(sysfs):
    sysfs.device("mlx5_0")
    port = sysfs.port("mlx5_0", gids=MLX5_GIDS)
    for name in ("state", "rate", "gids/1", "gid_attrs/types/3", "gid_attrs/ndevs/7"):
        (port / name).unlink()
        (port / name).mkdir()  # reading it fails, also for root
    (port / "gids/6").write_text("not a GID\n")
    (port / "gids/0").write_bytes(b"\xff\xfe\n")
    (found,) = ports(sysfs)
    assert (found.state, found.active, found.rate) == ("unknown", False, "unknown rate")
    assert [(gid.index, gid.netdev) for gid in found.gids] == [(2, "eth0"), (7, "")]
    os.rename(port / "link_layer", port / "link_layer.away")
    assert ports(sysfs)[0].transport == "unknown"
    (port.parent.parent / "node_type").unlink()
    assert ports(sysfs)[0].transport == "unknown"


def test_the_file_by_which_a_device_is_opened(sysfs):
    sysfs.device("mlx5_0")
    sysfs.device("mlx5_1")
    assert device_file("mlx5_1", sysfs.root) == "uverbs1"
    assert device_file("mlx5_2", sysfs.root) == ""


# -- choose_ports ------------------------------------------------------------------------------------------


def port(device="mlx5_0", number=1, rate="100 Gb/sec", state="ACTIVE", software=False, gids=(), transport="RoCE"):
    return PortInfo(device, number, transport, software, state, rate, tuple(gids))


FAST, SLOW = port("mlx5_1", rate="400 Gb/sec"), port("mlx5_0", rate="25 Gb/sec")
DOWN = port("mlx5_2", rate="800 Gb/sec", state="DOWN")
RXE = port("rxa", rate="1000 Gb/sec", software=True)


def test_the_fastest_port_that_is_up_is_chosen_and_hardware_before_software():
    everything = [SLOW, RXE, FAST, DOWN, port("odd", rate="unknown rate"), port("efa_0", transport="unspecified")]
    assert choose_ports(everything, VerbsOptions()) == [FAST]
    assert choose_ports(everything, VerbsOptions(software=True)) == [FAST]
    assert choose_ports([RXE, DOWN, SLOW], VerbsOptions(software=True)) == [SLOW]
    assert choose_ports([RXE, DOWN], VerbsOptions(software=True)) == [RXE]
    assert choose_ports([port("one"), port("two")], VerbsOptions())[0].device == "one"


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        ([], VerbsOptions(), "no RDMA device: the kernel shows none in /sys/class/infiniband .*lspci"),
        ([], VerbsOptions(("mlx5_0",)), "no RDMA device"),
        (
            [RXE, port("rxa", 2, software=True), port("rxb", software=True)],
            VerbsOptions(),
            r"only software RDMA here \(rxa, rxb\), which is slower than tcp: it is used only when asked for by name "
            r"\(rdma_device=rxa\) or by rdma_fabrics=verbs",
        ),
        ([DOWN, RXE], VerbsOptions(), r"no RDMA port is ACTIVE: mlx5_2:1 is DOWN \(see the cable, `ip link set"),
        (
            [DOWN, port("rxa", software=True, state="INIT")],
            VerbsOptions(software=True),
            "no RDMA port is ACTIVE: mlx5_2:1 is DOWN, rxa:1 is INIT",
        ),
        (
            [SLOW, FAST],
            VerbsOptions(("mlx5_7",)),
            "rdma_device=mlx5_7: there is no such device or port here. There is: mlx5_0:1, mlx5_1:1.",
        ),
        ([SLOW, FAST], VerbsOptions(("mlx5_0:2",)), "rdma_device=mlx5_0:2: there is no such device or port"),
        ([SLOW], VerbsOptions(("mlx5_0:x",)), "rdma_device=mlx5_0:x: there is no such device or port"),
        ([SLOW], VerbsOptions(("mlx5",)), "rdma_device=mlx5: there is no such device or port"),
        (
            [SLOW, DOWN],
            VerbsOptions(("mlx5_2",)),
            r"rdma_device=mlx5_2: mlx5_2 port 1 \(RoCE, 800 Gb/sec\) is DOWN, not",
        ),
        ([SLOW, DOWN], VerbsOptions(("mlx5_0", "mlx5_2")), "rdma_device=mlx5_2: .* is DOWN"),
    ],
)
def test_what_cannot_be_chosen_is_explained(found, options, message):
    with pytest.raises(FabricUnavailable, match=message):
        choose_ports(found, options)


def test_devices_that_are_named_are_used_in_that_order_and_may_be_software():
    two = [port("mlx5_0", 1, state="DOWN"), port("mlx5_0", 2), port("mlx5_1"), RXE]
    assert choose_ports(two, VerbsOptions(("rxa", "mlx5_1"))) == [RXE, port("mlx5_1")]
    assert choose_ports(two, VerbsOptions(("mlx5_0",))) == [port("mlx5_0", 2)]
    assert choose_ports(two, VerbsOptions(("mlx5_0:2", "mlx5_0"))) == [port("mlx5_0", 2)]
    with pytest.raises(FabricUnavailable, match="is DOWN"):
        choose_ports(two, VerbsOptions(("mlx5_0:1",)))


# -- choose_gid --------------------------------------------------------------------------------------------


def gid(index, address, kind="RoCE v2"):
    ip = ipaddress.ip_address(address)
    value = ipaddress.IPv6Address(f"::ffff:{ip}" if ip.version == 4 else str(ip))
    return Gid(index, value, kind, "eth0")


V1, LINK, IPV6, IPV4, OTHER = (
    gid(0, "192.0.2.7", "RoCE v1"),
    gid(1, "fe80::1"),
    gid(2, "2001:db8::7"),
    gid(3, "192.0.2.7"),
    gid(4, "198.51.100.7"),
)
ALL = (V1, LINK, IPV6, IPV4, OTHER)


@pytest.mark.parametrize(
    ("gids", "near", "chosen", "why"),
    [
        (ALL, None, IPV4, "RoCE v2, routable IPv4"),
        (ALL, "203.0.113.1", IPV4, "RoCE v2, routable IPv4"),
        (ALL, "198.51.100.7", OTHER, "the address of the control stream"),
        (ALL, "2001:db8::7", IPV6, "the address of the control stream"),
        (ALL, "fe80::1", LINK, "the address of the control stream"),
        ((V1, LINK, IPV6), None, IPV6, "RoCE v2, routable IPv6"),
        ((V1, LINK), None, LINK, "RoCE v2, this link only"),
        ((gid(5, "169.254.1.2"), IPV6), None, IPV6, "RoCE v2, routable IPv6"),
        ((V1,), "192.0.2.7", V1, "RoCE v1, not routable"),
        (
            (gid(1, "fe80::2", "IB"), gid(0, "fe80::1", "IB")),
            "fe80::1",
            gid(1, "fe80::2", "IB"),
            "the only kind there is",
        ),
    ],
)
def test_the_best_gid_is_the_one_beside_the_control_stream_then_a_routable_one(gids, near, chosen, why):
    address = ipaddress.ip_address(near) if near else None
    assert choose_gid(port(gids=gids), VerbsOptions(), address) == (chosen, why)


@pytest.mark.parametrize(
    ("family", "chosen"),
    [("RoCE v2 over IPv6", IPV6), ("RoCE v1 over IPv4", V1), ("RoCE v2 over IPv4", OTHER), ("", OTHER)],
)
def test_the_gid_is_of_the_peers_family_before_it_is_near(family, chosen):
    near = ipaddress.ip_address("198.51.100.7")
    assert choose_gid(port(gids=ALL), VerbsOptions(), near, family)[0] == chosen


def test_the_gid_that_is_asked_for_is_taken_whatever_is_better():
    options = VerbsOptions(gid_index=1)
    assert choose_gid(port(gids=ALL), options, ipaddress.ip_address("192.0.2.7")) == (LINK, "rdma_gid_index")
    assert choose_gid(port(gids=ALL), options, family="RoCE v2 over IPv6") == (LINK, "rdma_gid_index")


@pytest.mark.parametrize(
    ("gids", "options", "family", "message"),
    [
        ((), VerbsOptions(), "", r"mlx5_0 port 1 \(.*\) has no GID: its interface needs an IP address. There is: none"),
        (
            (V1, IPV4),
            VerbsOptions(),
            "RoCE v2 over IPv6",
            "no GID for RoCE v2 over IPv6, which the peer uses. There is:",
        ),
        (
            (IPV4,),
            VerbsOptions(gid_index=9),
            "",
            r"no GID of rdma_gid_index=9. There is: GID 3 \(RoCE v2, 192.0.2.7 on",
        ),
        ((), VerbsOptions(gid_index=0), "", "no GID of rdma_gid_index=0. There is: none"),
        (
            (IPV4,),
            VerbsOptions(gid_index=3),
            "InfiniBand",
            r"rdma_gid_index=3 is RoCE v2 over IPv4, the peer uses InfiniBand. There is: GID 3",
        ),
    ],
)
def test_a_missing_gid_is_explained(gids, options, family, message):
    with pytest.raises(FabricUnavailable, match=message):
        choose_gid(port(gids=gids), options, family=family)
