"""What doctor says of a host, its kernel and its FLARE, on hosts that are described by a folder."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest

from nvflare_rdma.cli import main
from nvflare_rdma.cli.doctor import examine
from nvflare_rdma.cli.doctor_host import NOTE, OK, PROBLEM, Check, check_host
from nvflare_rdma.flare_compat import TRIED
from nvflare_rdma.settings import Settings
from tests.support.kits import change

USUAL = {
    "sys/net/ipv4/tcp_congestion_control": "cubic",
    "sys/net/ipv4/tcp_available_congestion_control": "reno cubic",
    "sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456",
    "sys/net/ipv4/tcp_wmem": "4096\t16384\t4194304",
    "sys/net/ipv4/ip_local_port_range": "32768\t60999",
    "sys/net/core/somaxconn": "4096",
    "sys/net/core/default_qdisc": "fq_codel",
}
TABLE = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class Host:
    """What the files below /proc say."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self.say(USUAL)

    def say(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.proc / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def listens(self, *ports: int, command: str = "", process: int = 4711) -> None:
        lines = [
            f"{n}: 00000000:{port:04X} 00000000:0000 0A 0:0 00:0 0 0 0 {1000 + n} 1\n" for n, port in enumerate(ports)
        ]
        dialled = "9: 0100007F:4E20 0100007F:1F90 01 0:0 00:0 0 0 0 999 1\n"  # of port 20000, but it does not listen
        self.say({"net/tcp": TABLE + dialled + "".join(lines)})
        if command:
            self.say({f"{process}/cmdline": command.replace(" ", "\0") + "\0"})
            (self.proc / f"{process}/fd").mkdir()
            os.symlink("socket:[1000]", self.proc / f"{process}/fd/3")

    def checks(self, workspace: Path | None = None, flare: str = TRIED[0], huge: str = "madvise", **settings):
        found = check_host(Settings(**settings), workspace, flare, huge, self.proc)
        assert all(bool(check.advice) or check.verdict == OK for check in found)
        return found

    def one(self, name: str, **settings) -> Check:
        (check,) = (check for check in self.checks(**settings) if check.name == name)
        return check


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "proc")


def test_a_usual_host_is_well(host):
    found = host.checks()
    assert {check.verdict for check in found} == {OK}
    assert [check.name for check in found] == [
        *("NVIDIA FLARE", "huge pages", "congestion control", "default_qdisc", "tcp buffers", "somaxconn", "GPU")
    ]


def test_what_the_kernel_does_not_tell_is_left_out(host, tmp_path):
    host.proc = tmp_path / "nothing"
    assert [check.name for check in host.checks()] == ["NVIDIA FLARE", "huge pages", "GPU"]


def test_a_release_of_flare_that_was_not_tried(host):
    check = host.one("NVIDIA FLARE", flare="2.9.7")
    assert (check.verdict, check.value) == (NOTE, "2.9.7 was not tried")
    assert TRIED[0] in check.advice


def test_huge_pages(host):
    assert host.one("huge pages", huge="always").verdict == OK
    check = host.one("huge pages", huge="never")
    assert (check.verdict, "echo madvise" in check.advice) == (NOTE, True)


@pytest.mark.parametrize(
    ("kernel", "offered", "setting", "verdict", "says"),
    [
        ("bbr", "reno cubic bbr", "", OK, "bbr (the kernel's; there is reno, cubic, too)"),
        ("reno", "reno cubic", "", NOTE, "rdma_tcp_congestion=cubic"),
        ("reno", "reno", "", NOTE, "modprobe tcp_bbr"),
        ("reno", "reno cubic", "cubic", OK, "cubic (rdma_tcp_congestion; there is reno, too)"),
        ("cubic", "reno cubic", "bbr", PROBLEM, "this kernel does not offer it, only reno, cubic"),
    ],
)
def test_congestion_control(host, kernel, offered, setting, verdict, says):
    host.say(
        {
            "sys/net/ipv4/tcp_congestion_control": kernel,
            "sys/net/ipv4/tcp_available_congestion_control": offered,
            "sys/net/core/default_qdisc": "fq",
        }
    )
    check = host.one("congestion control", rdma_tcp_congestion=setting)
    assert (check.verdict, says in check.value + check.advice) == (verdict, True)


def test_a_queue_that_does_not_pace(host):
    host.say({"sys/net/ipv4/tcp_congestion_control": "bbr", "sys/net/core/default_qdisc": "pfifo_fast"})
    assert host.one("default_qdisc").verdict == NOTE
    host.say({"sys/net/ipv4/tcp_congestion_control": "cubic"})
    assert host.one("default_qdisc").verdict == OK


def test_small_buffers(host):
    assert "419 Mbit/s a rail at 40 ms" in host.one("tcp buffers").value
    host.say({"sys/net/ipv4/tcp_wmem": "4096 16384 262144"})
    check = host.one("tcp buffers")
    assert (check.verdict, "26.2 Mbit/s a rail at 40 ms" in check.value) == (NOTE, True)
    assert "tcp_wmem" in check.advice


def test_a_short_queue(host):
    host.say({"sys/net/core/somaxconn": "64"})
    assert host.one("somaxconn").verdict == NOTE


# -- ports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "command", "verdict", "says"),
    [
        ((), "", OK, "20000-20001: all free"),
        ((20001, 8002), "/usr/bin/x", OK, "20000-20001: 1 of 2 are free"),
        ((20000, 20001), "/usr/sbin/nginx -g x", PROBLEM, "in use by nginx (process 4711)"),
        ((20000, 20001), "python3 -m nvflare.private.fed.app.server.server_train -m x", OK, "in use by FLARE"),
        ((20000, 20001), "", NOTE, "a process that this user may not see"),
    ],
)
def test_data_ports(host, taken, command, verdict, says):
    host.listens(*taken, command=command)
    check = host.one("data ports", rdma_data_ports=(20000, 20001))
    assert (check.verdict, says in check.value) == (verdict, True)


def test_a_port_that_the_kernel_may_give_away(host):
    assert [check.verdict for check in host.checks(rdma_data_ports=(30000, 40000)) if check.name == "data ports"] == [
        *(OK, NOTE)
    ]


def test_a_port_in_use_here_ends_with_1(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("NVFLARE_RDMA_DATA_PORTS", str(port))
        assert main(["doctor", "--format", "json"]) == 1
        checks = json.loads(capsys.readouterr().out)["data"]["checks"]
    (check,) = (check for check in checks if check["verdict"] == PROBLEM)
    assert re.match(rf"{port}: in use by \S.* \(process {os.getpid()}\)$", check["value"])


# -- GPU ---------------------------------------------------------------------------------------------------

TORCH = """
from types import SimpleNamespace
version = SimpleNamespace(cuda={cuda})
cuda = SimpleNamespace(device_count=lambda: {count}, get_device_name=lambda n: "NVIDIA A" + str(n))
"""


@pytest.mark.parametrize(
    ("torch", "verdict", "says"),
    [
        (TORCH.format(cuda="'12.8'", count=2), OK, "NVIDIA A0, NVIDIA A1; torch has CUDA 12.8"),
        (TORCH.format(cuda="'12.8'", count=0), NOTE, "driver 550.54, but torch (CUDA 12.8) sees no device"),
        (TORCH.format(cuda="None", count=0), NOTE, "driver 550.54, but torch is built without CUDA"),
        ("raise ImportError('libc10')", NOTE, "torch can't be loaded: ImportError('libc10')"),
        ("import os; os._exit(3)", NOTE, "torch can't be asked"),
    ],
    ids=["two", "none seen", "no CUDA", "broken", "crashes"],
)
def test_a_gpu_is_what_torch_says_of_it(host, tmp_path, monkeypatch, torch, verdict, says):
    host.say({"driver/nvidia/version": "NVRM version: driver 550.54\nGCC version: gcc 12\n"})
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no CUDA')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = host.one("GPU")
    assert (check.verdict, says in check.value) == (verdict, True)
    others = [check for check in host.checks() if check.name == "bitsandbytes"]
    if "_exit" not in torch:
        assert [(each.verdict, each.value) for each in others] == [(NOTE, "RuntimeError('no CUDA')")]


def test_torch_is_not_asked_with_what_is_in_the_folder_that_the_user_is_in(host, tmp_path, monkeypatch):
    host.say({"driver/nvidia/version": "NVRM version: driver 550.54\nGCC version: gcc 12\n"})
    for name in ("here", "installed"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('this is another json')")
    (tmp_path / "installed" / "torch.py").write_text("raise ImportError('the one that is installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path / "here")
    assert "the one that is installed" in host.one("GPU").value


# -- time-outs ---------------------------------------------------------------------------------------------


def time_outs(kit: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(kit).checks if check.name in ("time-outs", "slow messages")}


def test_what_ends_a_transfer_before_its_patience(provisioned):
    server, site = provisioned / "server", provisioned / "site-1"
    check = time_outs(server)["time-outs"]
    assert (check.verdict, check.advice) == (NOTE, 'add_transfer(recipe, patience="30m") in the job')
    assert "heart_beat_timeout=600 and dead_client_grace_period=60, streaming_idle_timeout=600" in check.value
    assert "max_runner_sync_timeout=60, streaming_idle_timeout=600" in time_outs(site)["time-outs"].value
    change(site / "local/comm_config.json", rdma_patience="30s")
    found = time_outs(site)
    assert (found["time-outs"].verdict, found.keys()) == (OK, {"time-outs"})


def test_what_ends_a_slow_message(provisioned):
    site = provisioned / "site-1"
    change(site / "local/comm_config.json", streaming_read_timeout=20, streaming_ack_wait=600)
    startup = site / "startup/fed_client.json"
    config = json.loads(startup.read_text())
    config["client"]["communication_timeout"] = 30
    startup.write_text(json.dumps(config))
    check = time_outs(site)["slow messages"]
    assert check.verdict == NOTE
    assert check.value.startswith("streaming_read_timeout=20, communication_timeout=30: ")
    assert check.advice == "leave them out, or set streaming_read_timeout=300, communication_timeout=300"
