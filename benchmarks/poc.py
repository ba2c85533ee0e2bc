"""A FLARE POC of real processes in a folder, with a port of its own: mutual TLS, a server and its sites.

python benchmarks/poc.py ADMIN_FOLDER JOB_FOLDER SECONDS     submits a job and waits for its end
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from measuring import free_port

ADMIN = "admin@nvidia.com"
_NAME = "poc"


def prepare(folder: Path, sites: int, scheme: str, environment: dict[str, str]) -> Path:
    """Provision a POC in `folder` with ``nvflare poc prepare``; returns where the participants' folders are."""
    participants: list[dict[str, object]] = [
        {
            "name": "server",
            "type": "server",
            "org": "nvidia",
            "default_host": "localhost",
            "fed_learn_port": free_port(),
        },
        {"name": ADMIN, "type": "admin", "org": "nvidia", "role": "project_admin"},
        *({"name": f"site-{i + 1}", "type": "client", "org": "nvidia"} for i in range(sites)),
    ]
    impl = "nvflare.lighter.impl"
    templates = ["master_template.yml", "aws_template.yml", "azure_template.yml"]
    builders: list[dict[str, object]] = [
        {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": templates}},
        {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": scheme}},
        {"path": f"{impl}.cert.CertBuilder"},
        {"path": f"{impl}.signature.SignatureBuilder"},
    ]
    project = {"api_version": 3, "name": _NAME, "participants": participants, "builders": builders}
    file = folder / "project.yml"
    file.write_text(json.dumps(project))  # JSON is YAML
    home = folder / "home"  # where FLARE notes what has been prepared
    home.mkdir()
    command = [str(Path(sys.executable).with_name("nvflare")), "poc", "prepare", "-i", str(file)]
    environment = environment | {"HOME": str(home), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    kits = folder / "poc" / _NAME / "prod_00"
    if done.returncode or not kits.is_dir():
        raise RuntimeError(f"nvflare poc prepare failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return kits


def start(kits: Path, environment: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    """The server's and the sites' parent processes, as their own start scripts start them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment = environment | {"PATH": path}
    started = []
    for kit in sorted(kits.glob("s*")):  # server, site-1, site-2 ...
        with open(kit / "console.log", "wb") as out:
            command = ["bash", str(kit / "startup" / "sub_start.sh"), "--once"]
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=kit,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
    return started


def submit(admin: str, job: str, seconds: float) -> int:
    """Submit a job and wait for its end; 0 if it was completed."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session = new_secure_session(ADMIN, admin, timeout=60)
    try:
        job_id = session.submit_job(job)
        _, meta = session.monitor_job_and_return_job_meta(job_id, timeout=seconds, poll_interval=0.5)
        status = meta["status"] if meta else f"no end after {seconds:g} s"
        print(f"{job_id}: {status}", flush=True)
        return int(status != "FINISHED:COMPLETED")
    finally:
        session.close()


if __name__ == "__main__":
    os._exit(submit(sys.argv[1], sys.argv[2], float(sys.argv[3])))  # FLARE's threads would keep it for a while
