"""The driver between two real processes: plain, TLS, mTLS, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.processes import SMALL, background, environment, free_port, run
from tests.support.running_drivers import wait_for_port

PEER = Path(__file__).with_name("echo_peer.py")
SIZES = [0, 1, 64 * 1024, 64 * 1024 + 1, 1024 * 1024 + 300, 9 * 1024 * 1024 + 7]


def exchange(tmp_path, server, client, scheme, sizes=SIZES, timeout=60.0, connect_deadline=20.0, **env):
    port = free_port()
    url = f"{scheme}://127.0.0.1:{port}"
    server_log = tmp_path / "server.log"
    with background(PEER, "serve", url, json.dumps(server), log=server_log, **env):
        wait_for_port(port)
        options = {"sizes": sizes, "connect_deadline": connect_deadline, **client}
        done = run(PEER, "ask", url, json.dumps(options), timeout=timeout, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, server_log.read_text()


def assert_all_equal(result, sizes):
    assert result["connected"]
    assert result["echoes"] == [{"size": size, "equal": True} for size in sizes]


@pytest.mark.parametrize(("fabrics", "says"), [("shm,tcp", "shm, 1 rails"), ("tcp", "tcp, 2 rails")])
def test_frames_of_all_sizes_arrive_equal(tmp_path, fabrics, says):
    result, log, _ = exchange(tmp_path, {}, {}, "rdma", NVFLARE_RDMA_FABRICS=fabrics)
    assert_all_equal(result, SIZES)
    assert f"data goes over {says}" in log


@pytest.mark.parametrize("fabrics", ["shm,tcp", "tcp"])
def test_flare_connects_again_when_the_server_was_killed_and_is_back(tmp_path, fabrics):
    url, env = f"rdma://127.0.0.1:{free_port()}", environment(NVFLARE_RDMA_FABRICS=fabrics)
    command = [sys.executable, str(PEER), "ask_twice", url, "{}"]
    with open(tmp_path / "client.log", "wb") as log:
        client = subprocess.Popen(
            command, env=env, cwd=SMALL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        with background(PEER, "serve", url, "{}", log=tmp_path / "1.log", NVFLARE_RDMA_FABRICS=fabrics) as server:
            assert client.stdout.readline() == b"true\n"
            server.kill()
            server.wait(60)
        with background(PEER, "serve", url, "{}", log=tmp_path / "2.log", NVFLARE_RDMA_FABRICS=fabrics):
            client.stdin.write(b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"true\n", (tmp_path / "client.log").read_text()
    finally:
        client.kill()
        client.communicate(timeout=60)


def test_a_message_larger_than_the_budget_arrives(tmp_path):
    sizes = [24 * 1024 * 1024]
    result, _, _ = exchange(tmp_path, {}, {}, "rdma", sizes, NVFLARE_RDMA_MEMORY_BUDGET_BYTES=str(1024 * 1024))
    assert_all_equal(result, sizes)


def test_mutual_tls_seals_the_data_and_reports_the_peers_name(tmp_path):
    authority = Authority(tmp_path / "pki")
    server = {"credentials": authority.issue("server", "server")}
    client = {"credentials": authority.issue("client", "site-1")}
    result, log, server_log = exchange(tmp_path, server, client, "srdma", NVFLARE_RDMA_FABRICS="tcp")
    assert_all_equal(result, SIZES)
    assert result["peer_cn"] == "server"
    assert "SSL site-1" in server_log
    assert "data goes over tcp, 2 rails" in log


def test_one_way_tls(tmp_path):
    authority = Authority(tmp_path / "pki")
    server = {"credentials": {**authority.issue("server", "server"), "connection_security": "tls"}}
    client = {"credentials": {"ca_cert": authority.root, "connection_security": "tls"}}
    result, _, _ = exchange(tmp_path, server, client, "srdma", [100_000])
    assert_all_equal(result, [100_000])


def test_secure_flag_alone_turns_tls_on(tmp_path):
    """FLARE says secure=True with the plain scheme when it is provisioned that way."""
    authority = Authority(tmp_path / "pki")
    server = {"credentials": authority.issue("server", "server")}
    client = {"credentials": authority.issue("client", "site-1")}
    result, _, server_log = exchange(tmp_path, server, client, "rdma", [100_000])
    assert_all_equal(result, [100_000])
    assert "SSL site-1" in server_log


def test_the_secure_scheme_alone_turns_tls_on(tmp_path):
    authority = Authority(tmp_path / "pki")
    server = {"secure": False, "credentials": authority.issue("server", "server")}
    client = {"secure": False, "credentials": authority.issue("client", "site-1")}
    result, _, server_log = exchange(tmp_path, server, client, "srdma", [100_000])
    assert_all_equal(result, [100_000])
    assert "SSL site-1" in server_log


def test_a_client_of_another_authority_is_refused_with_a_clear_line(tmp_path):
    server = {"credentials": Authority(tmp_path / "pki").issue("server", "server")}
    client = {"credentials": Authority(tmp_path / "other", "another-project").issue("client", "site-1")}
    result, client_log, server_log = exchange(tmp_path, server, client, "srdma", connect_deadline=8.0)
    assert not result["connected"]
    assert "the server's certificate is not trusted here" in client_log
    assert "does not trust this side's certificate" in server_log


def test_a_client_whose_certificate_is_of_another_authority_is_refused(tmp_path):
    """It trusts the server, but the server does not trust it."""
    authority, other = Authority(tmp_path / "pki"), Authority(tmp_path / "other", "another-project")
    server = {"credentials": authority.issue("server", "server")}
    # FLARE itself looks at the other pair; a client's connections use this one.
    own = {**authority.issue("server", "site-1"), **other.issue("client", "site-1"), "ca_cert": authority.root}
    client = {"credentials": own}
    result, client_log, server_log = exchange(tmp_path, server, client, "srdma", connect_deadline=8.0)
    assert not result["connected"]
    assert "the client's certificate is not trusted here" in server_log
    assert "the server does not trust this side's certificate" in client_log


def test_flare_compares_the_names_in_certificates_on_both_ends(tmp_path):
    """It does so only where the driver says that a connection is secure, and whose certificate it has seen."""
    authority = Authority(tmp_path / "pki")
    server, site = authority.issue("server", "server"), authority.issue("client", "site-1")
    others, another = authority.issue("client", "site-2"), authority.issue("server", "other")
    claims = "authenticated as '{}' but claimed endpoint '{}' requires identity '{}'"
    client = {"credentials": others}
    _, _, server_log = exchange(tmp_path, {"credentials": server}, client, "srdma", [], connect_deadline=10.0)
    assert claims.format("site-2", "site-1", "site-1") in server_log
    client = {"credentials": site}
    result, log, _ = exchange(tmp_path, {"credentials": another}, client, "srdma", [], connect_deadline=10.0)
    assert not result["connected"]
    assert claims.format("other", "server", "server") in log


def test_a_clear_client_of_a_secure_listener_is_refused(tmp_path):
    server = {"credentials": Authority(tmp_path / "pki").issue("server", "server")}
    result, _, server_log = exchange(tmp_path, server, {}, "rdma", connect_deadline=8.0)
    assert not result["connected"]
    assert "it does not speak TLS, which this listener requires" in server_log


def test_another_protocol_on_the_port_is_refused(tmp_path):
    url_port = free_port()
    server_log = tmp_path / "server.log"
    with background(PEER, "serve", f"rdma://127.0.0.1:{url_port}", "{}", log=server_log):
        wait_for_port(url_port)
        options = json.dumps({"sizes": [], "connect_deadline": 4.0})
        done = run(PEER, "ask", f"tcp://127.0.0.1:{url_port}", options, timeout=30)
    assert not json.loads(done.stdout)["connected"]
    assert "it is no nvflare-rdma peer; check the scheme in its URL" in server_log.read_text()


@pytest.mark.parametrize("port", ["abc"])
def test_a_bad_port_is_one_clear_error_and_no_retry(port, tmp_path):
    url = f"rdma://127.0.0.1:{port}" if port else "rdma://127.0.0.1"
    done = run(PEER, "ask", url, json.dumps({"sizes": [], "connect_deadline": 3.0}), timeout=30)
    assert done.stderr.count("ERROR") == done.stderr.count("bad port") == 1, done.stderr
    assert "give a whole number from 1 to 65535" in done.stderr
    assert url in done.stderr


def test_a_bad_setting_names_the_key_the_value_and_what_is_allowed(tmp_path):
    done = run(
        PEER,
        "ask",
        f"rdma://127.0.0.1:{free_port()}",
        json.dumps({"sizes": [], "connect_deadline": 1.0}),
        timeout=30,
        NVFLARE_RDMA_RAILS="many",
    )
    assert "rdma_rails='many' is not a whole number. Allowed: 1 to 64." in done.stderr


def test_verbs_alone_without_its_device_is_a_clear_error(tmp_path):
    port, env = free_port(), {"NVFLARE_RDMA_FABRICS": "verbs", "NVFLARE_RDMA_DEVICE": "gone0"}
    url = f"rdma://127.0.0.1:{port}"
    options, log = json.dumps({"sizes": [], "connect_deadline": 3.0}), tmp_path / "server.log"
    with background(PEER, "serve", url, "{}", log=log, **env):
        wait_for_port(port)
        done = run(PEER, "ask", url, options, timeout=60, **env)
    assert not json.loads(done.stdout)["connected"]
    assert "no fabric that both sides allow (rdma_fabrics=verbs): verbs: " in log.read_text()
