from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
from nvflare.private.fed.app.deployer import simulator_deployer
from nvflare.private.fed.app.simulator import simulator_runner

from nvflare_rdma import class_list, runtime, simulator
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.simulator import RdmaSimEnv
from nvflare_rdma.transfer import long_waits


class Job:
    """The part of a FedJob that running it needs."""

    name = "tiny"
    _deploy_map = {}

    def __init__(self):
        self.job = self
        self.app_packages = ["mine"]
        self.exported = None

    def set_app_packages(self, names):
        self.app_packages = names

    def export_job(self, folder):
        self.exported = folder


@pytest.mark.parametrize("scheme", ["ib", "", "RDMA"])
def test_a_bad_scheme_is_refused_at_once(scheme):
    with pytest.raises(ConfigError, match=f"scheme='{scheme}' is not a driver .* Allowed: rdma, tcp, grpc"):
        RdmaSimEnv(num_clients=2, scheme=scheme)


def test_deploy_starts_our_simulator_with_sim_envs_arguments(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(simulator, "_run", lambda command, console: seen.append((command, console)) or 0)
    job = Job()
    env = RdmaSimEnv(num_clients=2, num_threads=1, workspace_root=str(tmp_path), scheme="grpc", log_config="full")
    assert env.deploy(job) == "tiny"
    ((command, console),) = seen
    expected = [sys.executable, "-m", "nvflare_rdma.simulator", os.path.join(job.exported, "tiny")]
    expected += [
        "-w",
        str(tmp_path / "tiny"),
        "-c",
        "site-1,site-2",
        "-t",
        "1",
        "--scheme",
        "grpc",
        "--parent-pid",
        str(os.getpid()),
        "-l",
        "full",
    ]
    assert command == expected
    assert console is None
    assert job.app_packages == ["mine", "nvflare_rdma"]


def test_deploy_fails_as_sim_env_does(tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "_run", lambda command, console: 2)
    env = RdmaSimEnv(clients=["a", "b"], workspace_root=str(tmp_path), scheme="tcp")
    with pytest.raises(RuntimeError, match="Simulation failed with return code 2"):
        env.deploy(Job())
    assert env.last_run_failed


def test_an_interrupted_run_ends_the_simulator(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    class Interrupted(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        def wait(self, timeout=None):
            if timeout is None and len(started) == 1 and not hasattr(self, "interrupted"):
                self.interrupted = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulator._run(["sleep", "600"], tmp_path / "console.log")
    assert started[0].poll() is not None


def test_the_simulators_output_goes_to_the_console_file(tmp_path):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert simulator._run([sys.executable, "-c", code], tmp_path / "console.log") == 3
    assert sorted((tmp_path / "console.log").read_text().split()) == ["err", "out"]


@pytest.mark.parametrize(("own", "seen"), [(None, "0"), ("1", "1")])
def test_grpc_does_nothing_when_the_simulator_forks_unless_the_user_wants_it(own, seen, tmp_path, monkeypatch):
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)
    if own is not None:
        monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", own)
    code = "import os; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    assert simulator._run([sys.executable, "-c", code], tmp_path / "console.log") == 0
    assert (tmp_path / "console.log").read_text().split() == [seen]


def test_a_port_for_a_site_is_the_sites_alone():
    get_open_ports = simulator._HeldPorts()
    ports = get_open_ports(2)
    assert len(set(ports)) == 2
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with Listener(("localhost", port)) as site, Client(("localhost", port)) as server:  # as FLARE's processes do
            server.send("config")
            assert site.accept().recv() == "config"


@pytest.mark.parametrize("scheme", ["rdma", "grpc"])
def test_server_and_sites_get_the_scheme(scheme, monkeypatch):
    monkeypatch.setattr(simulator_runner, "SimulatorDeployer", simulator_runner.SimulatorDeployer)
    for module in (simulator_runner, simulator_deployer):
        monkeypatch.setattr(module, "get_open_ports", module.get_open_ports)
    monkeypatch.setenv("NVFLARE_COMM_DRIVER_PATH", "/others")
    simulator.use_scheme(scheme)
    deployer = simulator_runner.SimulatorDeployer()
    args = type("Args", (), {"workspace": "/nowhere"})
    assert deployer._create_simulator_server_config("", 2)["service"]["scheme"] == scheme
    config, build_ctx = deployer._create_simulator_client_config("site-1", args)
    assert config["servers"][0]["service"]["scheme"] == scheme
    assert build_ctx["server_config"][0]["service"]["scheme"] == scheme
    for module in (simulator_runner, simulator_deployer):
        assert isinstance(module.get_open_ports, simulator._HeldPorts)
    folders = os.environ["NVFLARE_COMM_DRIVER_PATH"].split(os.pathsep)
    plugin = str(Path(simulator.__file__).parent / "plugin")
    assert folders == ([plugin, "/others"] if scheme == "rdma" else ["/others"])


def test_a_simulator_that_a_script_has_started_draws_on_its_terminal(tmp_path, monkeypatch):
    """It is in a session of its own, of which the terminal knows nothing, and FLARE's server is forked from it."""
    ours = runtime.Shared()
    monkeypatch.setattr(runtime, "_shared", ours)
    monkeypatch.setattr(simulator, "_end_with", lambda parent: None)
    monkeypatch.setattr(simulator, "use_scheme", lambda scheme: None)
    monkeypatch.setattr(simulator, "allow_for", lambda job, workspace: None)
    add_options, _ = simulator.simulator_entry()
    monkeypatch.setattr(simulator, "simulator_entry", lambda: (add_options, lambda args: 0))
    asked = []
    monkeypatch.setattr(long_waits, "own_terminal", asked.append)
    assert simulator.main(["job", "-n", "1", "--parent-pid", "17"]) == 0
    for forked in (False, True):
        if forked and (child := os.fork()):
            assert os.waitpid(child, 0)[1] == 0
            return
        asked.clear()
        try:
            waits = runtime.shared().long_waits
            with waits.wait("site-1", 0.0) as one:
                waits.look(one, 3, 100, 3.0)
        finally:
            if forked:
                os._exit(asked != [17])
        assert asked == [17]


@pytest.mark.parametrize("given", [None, "mine"])
def test_the_workspace_that_flare_uses_gets_the_entries(given, tmp_path, monkeypatch):
    """Without -w it is one of FLARE's choice."""
    job = tmp_path / "job"
    (job / "app/config").mkdir(parents=True)
    (job / "app/config/config_fed_server.json").write_text('{"path": "nvflare_rdma.filters.ModelQuantizer"}')
    add_options, _ = simulator.simulator_entry()
    ran = []

    def run(args):
        ran.append(Path(simulator_runner.SimulatorRunner(args.job_folder, args.workspace).workspace))

    monkeypatch.setattr(simulator, "simulator_entry", lambda: (add_options, run))
    monkeypatch.setattr(simulator, "use_scheme", lambda scheme: None)  # else for all tests after this one
    monkeypatch.chdir(tmp_path)
    assert simulator.main([str(job), "-n", "1", *([] if given is None else ["-w", given])]) == 0
    (workspace,) = ran
    assert class_list.read(workspace).listed
    assert class_list.read(workspace).missing == []
