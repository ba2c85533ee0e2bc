"""Who is at the other end of a data channel: FLARE cells with certificates of one provisioning, each its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace
from nvflare.client.cell.bootstrap import BOOTSTRAP_FILE_ENV_VAR
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context
from nvflare.fuel.f3.stats_pool import StatsPoolManager

from nvflare_rdma import runtime as runtimes
from nvflare_rdma.channel.bodies import BufferSource
from nvflare_rdma.errors import FabricError
from nvflare_rdma.streaming import component, trainer
from nvflare_rdma.transfer import peers
from nvflare_rdma.transfer.addresses import TICKET_BYTES
from tests.support.bodies import TestSink
from tests.support.certificates import Authority
from tests.support.data_channels import runtime
from tests.support.direct_transfers import LARGE, Direct
from tests.support.tcp_pair import DEADLINE
from tests.support.trickling import TlsPeer, trickle
from tests.support.waiting import eventually

SERVER, SITE, OTHER, TRAINER = "server.job", "site-1.job", "site-2.job", "site-1.job.trainer"
HOST = "fl.example.org"  # the name in the server's certificate, which is not the cell's
DATA = bytes(range(250)) * 400


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """By the first part of a cell's name: what FLARE gives to the cell."""
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {
        "server": authority.issue("server", HOST),
        "site-1": authority.issue("client", "site-1"),
        "site-2": authority.issue("client", "site-2"),
        "of a job": authority.issue("client", "site-1", ["job/1234", "cell/site-1.job"]),
        "of another job": authority.issue("client", "site-1", ["job/5678", "cell/site-1.job2", "cell/site%2D1.x"]),
        "renewed": authority.issue("server", HOST),
        "forger": authority.issue("client", "x\nERROR all is lost"),
        "impostor": authority.issue("server", "other.example.org"),
    }


@pytest.fixture
def flare_cell(pki):
    """flare_cell("site-1.job", connection_security=...): made as FLARE does, and not started."""

    def make(name: str, **credentials: str) -> Cell:
        identities = {} if name == SERVER else {"server": HOST}
        # A trainer's own connection is to its site's job process, and clear.
        files = {**pki[name.split(".")[0]], **credentials} if name != TRAINER else {}
        parent, url = "tcp://127.0.0.1:1", "stcp://127.0.0.1:2"
        with pytest.MonkeyPatch.context() as patch:  # FLARE knows one cell of a name in a process
            patch.setattr(CoreCell, "ALL_CELLS", {})
            patch.setattr(StatsPoolManager, "pools", {})
            return Cell(name, url, bool(files), files, parent_url=parent, auth_identity_map=identities)

    return make


@pytest.fixture
def channels(cell, flare_cell, monkeypatch):
    """channels(SITE) -> PeerLinks, as `RdmaTransfer` makes them."""
    monkeypatch.setattr(component, "this_runtime", runtime)

    def make(name: str, **credentials: str):
        cell.made.append(component.open_links(flare_cell(name, **credentials)))
        return cell.made[-1]

    return make


@pytest.fixture
def trainer_channels(channels, flare_cell, monkeypatch):
    """trainer_channels(SITE) -> those of a trainer that this site's job process has started."""
    monkeypatch.setattr(runtimes, "_shared", runtimes.Shared())
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def make(site: str):
        trainer.hand_on(flare_cell(site))
        os.environ[BOOTSTRAP_FILE_ENV_VAR] = "/app/bootstrap.json"
        try:
            return channels(TRAINER)
        finally:
            del os.environ[BOOTSTRAP_FILE_ENV_VAR]
            trainer.take_back()

    return make


class Listener:
    """Who answers at an address with somebody's certificate; ``heard`` gets what it was sent in TLS."""

    def __init__(self, sock: socket.socket, credentials: dict) -> None:
        self.heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._sock = sock
        self._tls = get_ssl_context({**credentials, "secure": True}, ssl_server=True)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        guest, _ = self._sock.accept()
        guest.settimeout(DEADLINE)
        heard = b""
        with contextlib.suppress(OSError), self._tls.wrap_socket(guest, server_side=True) as tls:
            while data := tls.recv(4096):
                heard += data
        self.heard.put(heard)

    @property
    def invitation(self) -> dict:
        return {"hosts": ["127.0.0.1"], "port": self._sock.getsockname()[1], "ticket": b"t" * TICKET_BYTES}


@contextmanager
def listening(credentials: dict, address=("127.0.0.1", 0)) -> Iterator[Listener]:
    with socket.create_server(address) as sock:
        yield Listener(sock, credentials)


def assert_moves(sender, receiver) -> None:
    sink = TestSink(len(DATA))
    label = receiver.expected.expect(sender.name, [sink])
    sender.find(receiver.name).offer(BufferSource(memoryview(DATA)), label).wait(DEADLINE)
    assert sink.ended.wait(DEADLINE)
    assert bytes(sink.memory) == DATA
    receiver.expected.forget(sender.name, label, 1)


def assert_joined(near, far) -> None:
    near.dial(far.name, far.invite(near.name))
    assert far.await_open(near.name) is not None
    assert_moves(near, far)
    assert_moves(far, near)


def refusals(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "refused the connection" in record.getMessage()]


# -- who is who --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", [{}, {"connection_security": "clear"}, {"connection_security": "tls"}], ids=str)
def test_each_with_its_own_certificate(channels, security):
    server = channels(SERVER, **security)
    for name in (SITE, OTHER):
        assert_joined(channels(name, **security), server)


def test_a_trainer_has_its_sites_certificate(channels, trainer_channels):
    it = trainer_channels(SITE)
    assert_joined(it, channels(SERVER))
    assert_joined(it, channels(SITE))


def test_a_certificate_for_cells_is_good_for_those_only(channels, pki, caplog):
    server = channels(SERVER)
    assert_joined(channels(SITE, **pki["of a job"]), server)
    thief = channels(SITE, **pki["of another job"])
    with pytest.raises(FabricError, match="no direct way"):
        thief.dial(SERVER, server.invite(SITE))
    eventually(lambda: refusals(caplog), DEADLINE)
    [line] = refusals(caplog)
    assert "'site-1.job' shows a certificate that is for 'site-1.job2', 'site-1.x' only" in line


def test_a_process_uses_the_credential_that_it_has(channels, flare_cell, pki, tmp_path, monkeypatch):
    """FLARE 2.10 gives a job's process `job_cert` in its run folder, and keeps the site's key from it."""
    monkeypatch.setattr(runtimes, "_shared", runtimes.Shared())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder = tmp_path / "a-job" / "job_cert"
    folder.mkdir(parents=True)
    its = pki["of a job"]
    files = {
        "ca_cert": its["ca_cert"],
        "client_cert": str(shutil.copy(its["client_cert"], folder / "job.crt")),
        "client_key": str(shutil.copy(its["client_key"], folder / "job.key")),
    }
    server = channels(SERVER)
    assert_joined(channels(SITE, **files), server)
    trainer.hand_on(flare_cell(SITE, **files))
    handed = json.loads(os.environ[trainer._SITE])
    trainer.take_back()
    assert {handed["credentials"][name] for name in ("client_cert", "client_key")} == {
        str(folder / "job.crt"),
        str(folder / "job.key"),
    }
    assert not any("key" in name and value != files["client_key"] for name, value in handed["credentials"].items())


@pytest.mark.parametrize(
    ("kit", "host"),
    [
        ({"servers": [{"service": {"target": "fl.example.org:8002"}}]}, "fl.example.org"),
        ({"servers": [{"service": {"target": "[fd00::1]:8002"}}]}, "fd00::1"),
        ({"servers": []}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_a_server_knows_from_its_kit_how_it_is_reached(kit, host, tmp_path):
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    if kit is not None:
        (tmp_path / "startup" / "fed_server.json").write_text(json.dumps(kit))
    context = FLContext()
    engine = SimpleNamespace(get_workspace=lambda: Workspace(str(tmp_path), "server"))
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    assert component._server_host(context) == host


def test_a_certificate_that_is_renewed_is_used_by_the_next_link_on_both_sides(channels, pki, tmp_path):
    def certificate(link) -> str:
        return ssl.DER_cert_to_PEM_cert(link._stream._tls.getpeercert(binary_form=True))

    def pem(files: dict[str, str], role: str) -> str:
        return Path(files[f"{role}_cert"]).read_text()

    folder = {name: str(shutil.copy(path, tmp_path)) for name, path in pki["server"].items()}
    server = channels(SERVER, **folder)
    first, second = channels(SITE), channels(OTHER)
    assert certificate(first.dial(SERVER, server.invite(SITE))) == pem(pki["server"], "server")
    for name in ("server_cert", "server_key"):
        shutil.copy(pki["renewed"][name], folder[name])
    assert certificate(second.dial(SERVER, server.invite(OTHER))) == pem(pki["renewed"], "server")
    assert_moves(first, server)  # what is open stays open


def test_a_sites_ticket_is_no_use_to_another_site(channels, caplog):
    server, thief, owner = channels(SERVER), channels(OTHER), channels(SITE)
    sink = TestSink(len(DATA))
    label = server.expected.expect(SITE, [sink])
    with pytest.raises(FabricError, match="no direct way from site-2"):
        thief.dial(SERVER, invitation := server.invite(SITE))
    eventually(lambda: refusals(caplog), DEADLINE)
    [line] = refusals(caplog)
    assert "'site-1.job' has the certificate of 'site-1', but who is there shows that of 'site-2'" in line
    assert "it came with that one's ticket and gets nothing" in line
    assert server.find(SITE) is None
    assert not sink.ended.is_set()
    server.expected.forget(SITE, label, 1)
    assert owner.dial(SERVER, invitation)  # the thief has not used it up
    assert_joined(owner, server)


def test_nor_to_a_trainer_of_another_site(channels, trainer_channels, caplog):
    thief = trainer_channels(OTHER)
    server = channels(SERVER)
    with pytest.raises(FabricError, match="no direct way"):
        thief.dial(SERVER, server.invite(TRAINER))
    eventually(lambda: refusals(caplog), DEADLINE)
    assert "'site-1.job.trainer' has the certificate of 'site-1', but who is there shows" in refusals(caplog)[0]


@pytest.mark.parametrize("connection_security", ["mtls", "tls"])
@pytest.mark.parametrize(("which", "name"), [("site-2", "site-2"), ("impostor", "other.example.org")])
def test_who_answers_where_the_server_should_is_sent_no_ticket(channels, pki, which, name, connection_security):
    site = channels(SITE, connection_security=connection_security)
    credentials = {**pki[which], "connection_security": connection_security}
    with listening(credentials) as listener:
        with pytest.raises(FabricError, match="no direct way from site-1") as caught:
            site.dial(SERVER, listener.invitation)
        assert listener.heard.get(timeout=DEADLINE) == b""
    text = f"has the certificate of '{HOST}', but who is there shows that of '{name}': it was sent no ticket"
    assert f"'{SERVER}' {text}" in str(caught.value)


def test_who_answers_at_another_address_is_told_of_when_the_server_answers_too(channels, pki, caplog):
    server, site = channels(SERVER), channels(SITE)
    invitation = server.invite(SITE)
    with listening(pki["site-2"], ("127.0.0.2", invitation["port"])) as listener:
        site._dialler._server = ("127.0.0.2", 0)
        site.dial(SERVER, invitation)
        assert_moves(site, server)
        assert listener.heard.get(timeout=DEADLINE) == b""
    [line] = [record.getMessage() for record in caplog.records if "who is there shows" in record.getMessage()]
    assert f"127.0.0.2:{invitation['port']}" in line
    assert "'site-2'" in line


def test_an_impostor_ends_a_pull_as_no_direct_way_does(channels, cell, pki, monkeypatch):
    site, sender = channels(SITE), Direct(cell, {"a": np.zeros(3 * LARGE)})
    with listening(pki["site-2"]) as listener:
        monkeypatch.setattr(sender.channels, "invite", lambda peer: listener.invitation)
        with pytest.raises(FabricError, match=r"no direct way from site-1.job to server: .*that of 'site-2'"):
            sender.pull(site)
    sender.service.close()


def test_what_a_certificate_says_can_not_forge_a_line_of_the_log(channels, pki):
    with (
        listening(pki["forger"]) as listener,
        pytest.raises(FabricError, match=r"shows that of 'x\\nERROR all is lost'"),
    ):
        channels(SITE).dial(SERVER, listener.invitation)


# -- deadlines ---------------------------------------------------------------------------------------------


def test_a_ticket_that_trickles_in_one_record_does_not_keep_the_door(channels, pki, monkeypatch, caplog):
    monkeypatch.setattr(peers, "GREETING_TIMEOUT", 1.0)
    server = channels(SERVER)
    invitation = server.invite(SITE)
    with socket.create_connection(("127.0.0.1", invitation["port"]), DEADLINE) as sock:
        peer = TlsPeer(sock, get_ssl_context({**pki["site-1"], "secure": True}, ssl_server=False))
        peer.greet()
        with trickle(sock, peer.encrypt(bytes(16_000))):
            eventually(lambda: "it said nothing in time" in caplog.text, DEADLINE)
