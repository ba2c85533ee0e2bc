"""A federation as FLARE provisions it, with mutual TLS: each participant's processes on a host of a `Star`.

federation.py ADMIN_FOLDER JOB_FOLDER SECONDS      submits a job, waits for its end, and prints its record as JSON
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, SMALL
from tests.support.waiting import eventually
from tests.wan.wire import Star

SERVER = "server"
PORT = 8002
ADMIN = "admin@nvidia.com"
_PROJECT = "sites"
_IMPL = "nvflare.lighter.impl"


@dataclass(frozen=True)
class Job:
    """A job that has ended. `results` is what FLARE keeps of the server's run."""

    id: str
    status: str
    results: Path


class Federation:
    """Starts a server and sites that wait for jobs; they end with the namespaces that they are in. `extra` is for their
    environment, `configured` for the `comm_config.json` of each; `one_port` has the `rdma_data_ports` of participants
    whose parents join connections, "" for FLARE's own port. `builder` has the arguments of `RdmaBuilder`, which is part
    of the project only then; `without` names the participants on whose hosts this package is not installed;
    `reached_at` is the host where the sites reach the server."""

    def __init__(
        self,
        star: Star,
        folder: Path,
        sites: list[str],
        scheme: str,
        one_port: Mapping[str, str] | None = None,
        configured: Mapping[str, Mapping[str, Any]] | None = None,
        builder: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
        reached_at: str = SERVER,
        **extra: str,
    ) -> None:
        self._star = star
        self._folder = folder
        # FLARE's processes find no torch, whose loading takes longer than the job.
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("NVFLARE_")}
        self._environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SMALL / "without_torch")])
        self._environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment |= extra
        self._others = dict.fromkeys(without, self._without_package() if without else {})
        self.kits = self._provision(sites, scheme, builder, reached_at)
        for name, settings in (configured or {}).items():
            self._configure(name, settings)
        for name, ports in (one_port or {}).items():
            add_parent_door(self.kits / name / "local", ports)
        self._said_before: dict[str, int] = {}
        self._processes = {name: self._start(name) for name in [SERVER, *sites]}

    def wait_for_sites(self) -> None:
        """Until all participants say that they are connected, each since it was started last."""
        for name, process in self._processes.items():
            text = "Server started" if name == SERVER else "Successfully registered client"
            eventually(lambda name=name, process=process, text=text: self._says(name, process, text), 120.0)  # type: ignore[misc]

    def start(self, name: str) -> None:
        """Start a participant again whose processes have ended."""
        self._processes[name] = self._start(name)

    def run(self, job: Path, seconds: float) -> Job:
        """Submit a job from the server's host, and wait for its end."""
        arguments = [str(self.kits / ADMIN), str(job), str(seconds)]
        command = self._star.on(SERVER, sys.executable, "-m", "tests.wan.federation", *arguments)
        done = subprocess.run(
            command, env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the job could not be run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        return Job(said["id"], said["status"], Path(said["results"]))

    def run_folder(self, site: str, job: Job) -> Path:
        """The run folder of a site's job process."""
        return self.kits / site / job.id

    def log(self, site: str, job: Job) -> str:
        """What a site's job process has logged."""
        return (self.run_folder(site, job) / "log.txt").read_text()

    def console(self, name: str) -> str:
        """What a participant's parent has printed, each time that it was started."""
        return (self.kits / name / "console.log").read_text()

    def restart(self, name: str, configured: Mapping[str, Any]) -> None:
        """End a participant that runs no job, and start it again with another `comm_config.json`."""
        os.killpg(self._processes[name].pid, signal.SIGKILL)
        self._processes[name].wait(60.0)
        self._configure(name, configured)
        self._processes[name] = self._start(name)

    def _configure(self, name: str, configured: Mapping[str, Any]) -> None:
        (self.kits / name / "local" / "comm_config.json").write_text(json.dumps(configured))

    def environment(self, name: str) -> dict[str, str]:
        """That of a participant's processes."""
        return self._environment | self._others.get(name, {})

    def _without_package(self) -> dict[str, str]:
        """For the environment of a host that has what this one has, but for this package: another Python's
        installation is shown it, entry by entry."""
        installed, programs = self._folder / "installed", self._folder / "programs"
        for folder in (installed, programs):
            folder.mkdir(parents=True)
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if "nvflare_rdma" not in entry.name and entry.suffix != ".pth":
                (installed / entry.name).symlink_to(entry)
        (programs / "python3").symlink_to(Path(sys.executable).resolve())
        return {
            "PYTHONPATH": os.pathsep.join([str(SMALL / "without_torch"), str(installed)]),
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        }

    def _provision(self, sites: list[str], scheme: str, builder: Mapping[str, Any] | None, reached_at: str) -> Path:
        hosts = {"default_host": reached_at, "host_names": [SERVER]}
        participants: list[dict[str, object]] = [
            {"name": SERVER, "type": "server", "org": "nvidia", "fed_learn_port": PORT, **hosts},
            {"name": ADMIN, "type": "admin", "org": "nvidia", "role": "project_admin"},
            *({"name": site, "type": "client", "org": "nvidia"} for site in sites),
        ]
        templates = ["master_template.yml", "aws_template.yml", "azure_template.yml"]
        builders: list[dict[str, object]] = [
            {"path": f"{_IMPL}.workspace.WorkspaceBuilder", "args": {"template_file": templates}},
            *([] if builder is None else [{"path": "nvflare_rdma.provision.RdmaBuilder", "args": dict(builder)}]),
            {"path": f"{_IMPL}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": scheme}},
            {"path": f"{_IMPL}.cert.CertBuilder"},
            {"path": f"{_IMPL}.signature.SignatureBuilder"},
        ]
        project = {"api_version": 3, "name": _PROJECT, "participants": participants, "builders": builders}
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "project.yml"
        file.write_text(json.dumps(project))  # JSON is YAML
        command = ["nvflare", "provision", "-p", str(file), "-w", str(self._folder / "workspace"), "--force"]
        done = subprocess.run(
            command,
            env=self._environment | {"HOME": str(self._folder)},
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        kits = self._folder / "workspace" / _PROJECT / "prod_00"
        if done.returncode or not kits.is_dir():
            raise RuntimeError(f"nvflare provision failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        local = kits / SERVER / "local"
        resources = (local / "resources.json.default").read_text()
        (local / "resources.json").write_text(resources.replace("/tmp/nvflare/", f"{self._folder}/"))
        return kits

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        kit = self.kits / name
        command = self._star.on(name, "bash", str(kit / "startup" / "sub_start.sh"), "--once")
        with open(kit / "console.log", "ab") as out:
            self._said_before[name] = out.tell()
            return subprocess.Popen(
                *(command,),
                env=self.environment(name),
                cwd=kit,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _says(self, name: str, process: subprocess.Popen[bytes], text: str) -> bool:
        console = (self.kits / name / "console.log").read_bytes()[self._said_before[name] :].decode()
        assert process.poll() is None, console[-4000:]
        return text in console


def add_parent_door(local: Path, ports: str) -> None:
    """What an operator does, in a participant's folder for what is its own."""
    resources = local / "resources.json"
    if not resources.exists():
        resources.write_text((local / "resources.json.default").read_text())
    config = json.loads(resources.read_text())
    config["components"].append({"id": "rdma_door", "path": "nvflare_rdma.streaming.ParentDoor", "args": {}})
    resources.write_text(json.dumps(config))
    file = local / "comm_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, "rdma_data_ports": ports} if ports else known))


def submit(admin: str, job: str, seconds: float) -> dict[str, str]:
    """Submit a job and wait for its end."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session = new_secure_session(ADMIN, admin, timeout=60)
    try:
        job_id = session.submit_job(job)
        _, meta = session.monitor_job_and_return_job_meta(job_id, timeout=seconds, poll_interval=0.5)
        if not meta:
            return {"id": job_id, "status": f"no end after {seconds:g} s", "results": ""}
        return {"id": job_id, "status": meta["status"], "results": session.download_job_result(job_id)}
    finally:
        session.close()


if __name__ == "__main__":
    print(json.dumps(submit(sys.argv[1], sys.argv[2], float(sys.argv[3]))), flush=True)
    os._exit(0)  # FLARE's threads would keep it for a while
