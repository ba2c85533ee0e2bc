"""The doctor on machines that are described by a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from nvflare_rdma.cli import main
from nvflare_rdma.cli.doctor import Report, examine, roce_packet_bytes
from nvflare_rdma.cli.doctor_text import WIDTH, to_text
from nvflare_rdma.fabric.verbs import availability, memlock
from nvflare_rdma.settings import Settings
from tests.support.fake_sysfs import FakeSysfs


@pytest.fixture
def sysfs(tmp_path):
    made = FakeSysfs(tmp_path / "sys")
    (tmp_path / "dev").mkdir()
    return made


def look(sysfs: FakeSysfs, workspace: Path | None = None) -> tuple[Report, str]:
    """The report, and its text with every entry in one line."""
    report = examine(workspace, sysfs.root, sysfs.root.parent / "dev")
    text = to_text(report)
    assert all(len(line) <= WIDTH for line in text.splitlines() if "/" not in line), text
    return report, re.sub(r"\n {7,}(?=\S)", " ", text)


def device_files(sysfs: FakeSysfs, mode: int = 0o666) -> None:
    for name in os.listdir(sysfs.root / "class/infiniband_verbs"):
        file = sysfs.root.parent / "dev" / name
        file.touch()
        file.chmod(mode)


@pytest.fixture
def all_else_is_well(monkeypatch):
    monkeypatch.setattr(availability, "pyverbs_reason", lambda: "")
    monkeypatch.setattr(memlock, "memlock_limit", lambda: None)


def connectx(sysfs: FakeSysfs, **port: str) -> None:
    sysfs.device("mlx5_0")
    gids = {
        0: ("fe80::1", "IB/RoCE v1", "eth0"),
        1: ("fe80::1", "RoCE v2", "eth0"),
        3: ("192.0.2.7", "RoCE v2", "eth0"),
        4: ("198.51.100.7", "RoCE v2", "eth1"),
    }
    sysfs.port("mlx5_0", gids=gids, **port)
    sysfs.netdev("eth0", 1500)


# -- settings ----------------------------------------------------------------------------------------------


def test_the_settings_in_force_are_shown(sysfs, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_RAILS", "4")
    report, text = look(sysfs)
    assert (report.problems, report.settings_changed) == ([], ["rdma_rails"])
    assert report.settings_from == "the environment (of a site: --kit FOLDER)"
    assert re.search(r"^  rdma_rails +4 \(set\)$", text, re.MULTILINE)
    assert re.search(r"^  rdma_ack_timeout +16$", text, re.MULTILINE)


@pytest.mark.parametrize("place", [".", "local"])
@pytest.mark.parametrize("named", [True, False])
def test_the_settings_of_a_site_are_read_as_flare_reads_them(sysfs, tmp_path, monkeypatch, place, named):
    site = tmp_path / "site"
    (site / place).mkdir(parents=True)
    config = site / place / "comm_config.json"
    config.write_text(json.dumps({"rdma_device": "mlx5_7", "rdma_retry_count": 7, "other": {}}))
    monkeypatch.setenv("NVFLARE_RDMA_GID_INDEX", "3")
    monkeypatch.setenv("NVFLARE_RDMA_RETRY_COUNT", "2")
    if not named:
        monkeypatch.chdir(site)
    report, _ = look(sysfs, site if named else None)
    assert report.settings["rdma_device"] == ("mlx5_7",)
    assert report.settings["rdma_gid_index"] == 3
    assert report.settings["rdma_retry_count"] == 7  # FLARE prefers the file
    assert report.settings_from.endswith("comm_config.json and the environment")


def test_what_a_site_lets_jobs_without_code_use_is_shown(sysfs, tmp_path):
    assert look(sysfs)[0].class_list is None
    file = tmp_path / "local/resources.json.default"
    file.parent.mkdir()
    (tmp_path / "startup").mkdir()
    file.write_text(json.dumps({"class_allow_list": ["nvflare_rdma.streaming", "nvflare_rdma.persistors"]}))
    report, text = look(sysfs, tmp_path)
    assert report.problems == []
    assert report.class_list.missing == ["nvflare_rdma.filters"]
    assert f'can\'t use this package: add "nvflare_rdma.filters" to class_allow_list in {file}' in re.sub(
        " +", " ", text
    )
    file.write_text(json.dumps({"class_allow_list": ["nvflare_rdma."]}))
    report, text = look(sysfs, tmp_path)
    assert (report.class_list.missing, report.class_list.advice) == ([], "")
    assert f"may use this package: {file} allows it" in re.sub(" +", " ", text)
    file.write_text("{")
    assert "can't be read" in look(sysfs, tmp_path)[0].class_list.advice


@pytest.mark.parametrize(
    ("ports", "shown"),
    [("20000", "20000 (set)"), ("20000-20010", "20000-20010 (set)"), ("none", "none (set)"), ("auto", "auto")],
)
def test_ports_are_shown_as_they_are_set(monkeypatch, capsys, ports, shown):
    monkeypatch.setenv("NVFLARE_RDMA_DATA_PORTS", ports)
    assert main(["doctor"]) == 0
    assert re.search(rf"^  rdma_data_ports +{re.escape(shown)}$", capsys.readouterr().out, re.MULTILINE)


def test_every_setting_has_a_text(sysfs, monkeypatch):
    """Whatever type its value has."""
    values = {"fabrics": "verbs,tcp", "device": "a,b:1", "gid_index": 3, "tcp_congestion": "bbr", "rails": 4}
    values |= {"controller": "fixed", "integrity": "off", "ack_timeout": 9, "retry_count": 2, "data_ports": "7-9"}
    values |= {"chunk_bytes": 65536, "memory_budget_bytes": 1 << 24, "upgrade": "true", "patience": "4h"}
    assert {f"rdma_{name}" for name in values} == {each.name for each in fields(Settings)}
    for name, value in values.items():
        monkeypatch.setenv(f"NVFLARE_RDMA_{name.upper()}", str(value))
    _, text = look(sysfs)
    for name, value in values.items():
        assert re.search(rf"^  rdma_{name} +{value} \(set\)$", text, re.MULTILINE), name


def test_a_kit_without_a_configuration_of_its_own_has_the_defaults(sysfs, tmp_path, monkeypatch):
    """As FLARE provisions it."""
    kit = tmp_path / "site-1"
    for file in ("startup/fed_client.json", "startup/start.sh", "local/resources.json.default"):
        (kit / file).parent.mkdir(parents=True, exist_ok=True)
        (kit / file).write_text("{}")
    monkeypatch.setenv("NVFLARE_RDMA_RAILS", "4")
    report, text = look(sysfs, kit)
    assert (report.problems, report.settings_changed) == ([], ["rdma_rails"])
    assert report.settings_from == f"the environment ({kit} has no comm_config.json)"
    assert "Settings, from the environment (" in text


def test_whoever_has_read_enough_sees_no_traceback():
    for command in ("doctor", "doctor --format json"):
        reader, writer = os.pipe()
        os.close(reader)  # as of a `head` that has ended
        with os.fdopen(writer, "wb") as closed:
            done = subprocess.run(
                [sys.executable, "-m", "nvflare_rdma.cli", *command.split()],
                stdout=closed,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_bad_setting_is_told_and_the_rest_is_shown_with_defaults(capsys, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_ACK_TIMEOUT", "99")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "ERROR: rdma_ack_timeout=99 is out of range. Allowed: 1 to 31." in out
    assert "Settings, the defaults, because of the error\n" in out
    assert "\ntcp      yes\n" in out
    assert main(["doctor", "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)["data"]
    assert report["problems"] == ["rdma_ack_timeout=99 is out of range. Allowed: 1 to 31."]
    assert report["settings"]["rdma_ack_timeout"] == Settings().rdma_ack_timeout


@pytest.mark.parametrize("content", ["{", None])
def test_a_configuration_that_cannot_be_read_is_told(sysfs, tmp_path, content):
    if content is not None:
        (tmp_path / "comm_config.json").write_text(content)
    report, text = look(sysfs, tmp_path)
    assert len(report.problems) == 1
    assert "ERROR: " in text


@pytest.mark.parametrize("missing", ["nvflare", "numpy", "pyverbs", "torch"])
def test_it_works_without_a_package(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom nvflare_rdma.cli import main; main(['doctor'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "\ntcp      yes\n" in result.stdout
    told = {
        "nvflare": "ERROR: NVIDIA FLARE can't be loaded",
        "numpy": "numpy can't be loaded",
        "pyverbs": "pyverbs is not installed for this Python",
        "torch": "",
    }
    assert told[missing] in " ".join(result.stdout.split())


def test_it_imports_no_torch():
    code = "from nvflare_rdma.cli import main; main(['doctor']); import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)


# -- devices -----------------------------------------------------------------------------------------------


def test_a_machine_without_rdma(sysfs):
    report, text = look(sysfs)
    assert (report.ports, report.modules_loaded) == ([], [])
    assert "\nRDMA devices: none\n" in text
    assert "\nverbs    no      no RDMA device: the kernel shows none" in text


@pytest.mark.usefixtures("all_else_is_well")
def test_a_hardware_port_is_chosen_and_everything_about_it_is_shown(sysfs):
    connectx(sysfs)
    sysfs.rxe()
    sysfs.module("ib_uverbs")
    sysfs.module("mlx5_ib")
    device_files(sysfs)
    report, text = look(sysfs)
    assert "\n  mlx5_0 port 1: ACTIVE, RoCE, 100 Gb/sec, chosen\n" in text
    assert "    eth0          MTU 1500: packets of 1024 bytes fit; 4096 need an MTU of 4192 or more" in text
    assert "    eth1          not in this network namespace" in text
    assert "    GID 1         fe80::1 (RoCE v2 on eth0)\n" in text
    assert "    GID 3         192.0.2.7 (RoCE v2 on eth0), chosen: RoCE v2, routable IPv4\n" in text
    assert "    packets       unknown: " in text  # there is no such device to open
    assert "\n  rxa port 1: ACTIVE, software RoCE, 10 Gb/sec\n" in text
    assert "10.8.0.1 (RoCE v2 on va), would be chosen: RoCE v2, routable IPv4" in text
    assert (
        "note          a software device is slower than tcp; it is used only when asked for, by rdma_device=rxa" in text
    )
    assert "loaded: ib_uverbs, mlx5_ib not loaded: ib_core, mlx4_ib" in text
    assert report.fabrics["verbs"].usable
    assert "\nverbs    yes     mlx5_0 port 1 (RoCE, 100 Gb/sec), GID 3 (RoCE v2, 192.0.2.7 on eth0)\n" in text


@pytest.mark.usefixtures("all_else_is_well")
@pytest.mark.parametrize(
    ("environment", "chosen", "reason"),
    [
        ({}, [], "only software RDMA here (rxa, rxb), which is slower than tcp"),
        ({"NVFLARE_RDMA_DEVICE": "rxb"}, ["rxb"], ""),
        ({"NVFLARE_RDMA_FABRICS": "verbs"}, ["rxa"], ""),
        ({"NVFLARE_RDMA_DEVICE": "rxc"}, [], "rdma_device=rxc: there is no such device or port here. There is: rxa:1"),
        ({"NVFLARE_RDMA_DEVICE": "rxa", "NVFLARE_RDMA_GID_INDEX": "7"}, ["rxa"], "has no GID of rdma_gid_index=7"),
    ],
)
def test_software_devices_are_used_only_when_asked_for(sysfs, monkeypatch, environment, chosen, reason):
    sysfs.rxe()
    sysfs.rxe("rxb", "vb", "10.8.0.2")
    device_files(sysfs)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report, _ = look(sysfs)
    assert [port.device for port in report.ports if port.chosen] == chosen
    assert report.fabrics["verbs"].usable == (not reason)
    assert reason in report.fabrics["verbs"].reason


@pytest.mark.usefixtures("all_else_is_well")
def test_a_fabric_that_the_settings_leave_out_is_marked(sysfs, monkeypatch):
    monkeypatch.setenv("NVFLARE_RDMA_FABRICS", "tcp")
    report, text = look(sysfs)
    assert [name for name, fabric in report.fabrics.items() if fabric.allowed] == ["tcp"]
    assert "\nshm      yes     left out by rdma_fabrics=tcp\n" in text


@pytest.mark.usefixtures("all_else_is_well")
def test_a_port_that_is_down_and_one_without_an_address(sysfs):
    connectx(sysfs, state="1: DOWN")
    sysfs.device("mlx5_1")
    sysfs.port("mlx5_1", state="1: DOWN")
    _, text = look(sysfs)
    assert "mlx5_0 port 1: DOWN, RoCE" in text
    assert "no GID        mlx5_1 port 1 (RoCE, 100 Gb/sec) has no GID: its interface needs an IP address" in text
    assert "verbs    no      no RDMA port is ACTIVE: mlx5_0:1 is DOWN, mlx5_1:1 is DOWN (see the cable" in text


@pytest.mark.usefixtures("all_else_is_well")
def test_a_port_on_which_no_rail_can_be_made_is_told(sysfs):
    sysfs.device("efa_0", "7: unspecified")
    sysfs.port("efa_0", link_layer="Unspecified")
    device_files(sysfs)
    report, text = look(sysfs)
    assert "  efa_0 port 1: ACTIVE, unspecified, 100 Gb/sec\n    not used      it has no reliable connections" in text
    assert "\n    note " not in text  # asking for it by name would not help
    assert "would be chosen" not in text
    assert [port.refusal in report.fabrics["verbs"].reason for port in report.ports] == [True]


def test_the_limit_of_locked_memory_is_shown_with_the_command(sysfs, monkeypatch):
    monkeypatch.setattr(availability, "pyverbs_reason", lambda: "")
    monkeypatch.setattr(memlock, "memlock_limit", lambda: 64 * 1024)
    connectx(sysfs)
    device_files(sysfs)
    _, text = look(sysfs)
    for start in ("  locked memory   ", "verbs    no      "):
        assert f"\n{start}this process may lock 64 KiB of memory (RLIMIT_MEMLOCK), RDMA needs 133120 KiB" in text
    assert text.count("`ulimit -l unlimited`") == 2


@pytest.mark.usefixtures("all_else_is_well")
class TestDeviceFiles:
    def reason(self, sysfs) -> str:
        report, text = look(sysfs)
        port = report.ports[0]
        assert port.cannot_open in text
        assert report.fabrics["verbs"].reason == port.cannot_open
        assert not report.fabrics["verbs"].usable
        return port.cannot_open

    def test_that_a_container_does_not_have(self, sysfs):
        connectx(sysfs)
        assert re.fullmatch(
            r"mlx5_0: there is no \S+/uverbs0: give it to the container \(docker: --device \S+\)", self.reason(sysfs)
        )

    def test_for_which_the_kernel_lacks_a_module(self, sysfs):
        connectx(sysfs)
        (sysfs.root / "class/infiniband_verbs/uverbs0").unlink()
        assert "the kernel module ib_uverbs is not loaded (`modprobe ib_uverbs`)" in self.reason(sysfs)

    def test_that_is_something_else(self, sysfs):
        connectx(sysfs)
        (sysfs.root.parent / "dev/uverbs0").mkdir()
        assert "can't be opened: Is a directory" in self.reason(sysfs)

    def test_that_is_for_others(self):
        with tempfile.TemporaryDirectory() as folder:  # pytest's own are for this user only
            os.chmod(folder, 0o755)
            sysfs = FakeSysfs(Path(folder, "sys"))
            connectx(sysfs)
            file = Path(folder, "uverbs0")
            file.touch(0o600)
            user = os.geteuid()
            if user != 0:
                file.chmod(0)
            try:
                if user == 0:
                    os.seteuid(65534)
                reason = availability.device_file_reason("mlx5_0", sysfs.root, Path(folder))
            finally:
                os.seteuid(user)
        assert f"{file} can't be opened: Permission denied; it is mode " in reason
        assert f"of user {user} and group " in reason
        assert "is that in the group rdma?" in reason


@pytest.mark.usefixtures("all_else_is_well")
def test_iwarp_takes_the_connection_manager(sysfs):
    sysfs.device("iw0", "4: RNIC")
    sysfs.port("iw0", gids={0: ("200:0:301::", "IB/RoCE v1", "lo")}, table=1)
    device_files(sysfs)
    file = sysfs.root.parent / "dev/rdma_cm"
    reason = look(sysfs)[0].fabrics["verbs"].reason
    assert reason.startswith(f"there is no {file}: `modprobe rdma_ucm`, and give it to the container")
    file.touch()
    verbs = look(sysfs)[0].fabrics["verbs"]
    assert (verbs.usable, verbs.reason) == (True, "")
    file.unlink()
    (sysfs.root / "class/infiniband/iw0/node_type").write_text("1: CA\n")  # RoCE does without
    (sysfs.root / "class/infiniband/iw0/ports/1/gid_attrs/types/0").write_text("RoCE v2\n")
    assert look(sysfs)[0].fabrics["verbs"].usable


@pytest.mark.parametrize(
    ("mtu", "fits"), [(9000, 4096), (4192, 4096), (4191, 2048), (1500, 1024), (1120, 1024), (1119, 512), (68, 0)]
)
def test_the_packets_that_fit_an_interface(mtu, fits):
    assert roce_packet_bytes(mtu) == fits


# -- the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enabled", "shown"),
    [
        ("always [madvise] never", "ok       huge pages          madvise"),
        (
            "always madvise [never]",
            "note     huge pages          never: large messages take longer. Fix: `echo madvise",
        ),
        (None, "ok       huge pages          unknown to this kernel"),
    ],
)
def test_huge_pages(sysfs, enabled, shown):
    if enabled:
        sysfs.write(sysfs.root / "kernel/mm/transparent_hugepage", enabled=enabled)
    assert f"\n  {shown}" in look(sysfs)[1]


def test_programs_get_all_of_it(sysfs):
    connectx(sysfs)
    report, _ = look(sysfs)
    got = json.loads(json.dumps(asdict(report)))
    assert got["ports"][0]["gids"][2]["address"] == "192.0.2.7"
    assert got["ports"][0]["netdevs"] == {"eth0": 1500, "eth1": None}
    assert set(got["fabrics"]) == {"verbs", "shm", "tcp"}
    assert got["settings"]["rdma_fabrics"] == ["verbs", "shm", "tcp"]


def test_whether_the_links_of_a_site_are_clear_is_said(sysfs, tmp_path):
    (tmp_path / "startup").mkdir()
    report, text = look(sysfs, tmp_path)
    assert "whoever is on the way can read and change models" in report.links
    assert re.search(r"links of RdmaTransfer +CLEAR: there are no certificates in startup", text)
    (tmp_path / "startup" / "rootCA.pem").write_text("")
    assert look(sysfs, tmp_path)[0].links == "TLS with the certificates in startup, and sealed chunks"
