"""`nvflare-rdma doctor --for RUNTIME`: what a site's containers or jobs need, as files that FLARE's `nvflare deploy
prepare` reads, and the commands that go with them. docs/docker.md, kubernetes.md and slurm.md show and explain
them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nvflare_rdma.cli.enable import told
from nvflare_rdma.cli.output import CommandError, Result
from nvflare_rdma.fabric import SYSFS
from nvflare_rdma.fabric.verbs import list_ports
from nvflare_rdma.kits import ADMIN, SERVER, find_kits

DOCKER, K8S, SLURM = "docker", "k8s", "slurm"
RUNTIMES = (K8S, DOCKER, SLURM)
#: Where the image of docs/deploy/Dockerfile has the driver.
IMAGE_DRIVER = "/opt/nvflare/lib/python3.11/site-packages/nvflare_rdma/plugin"
_PORT = 8004
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_DOCKER = """\
# nvflare deploy prepare {kit} --config docker.yaml
runtime: docker
parent:
  docker_image: nvflare-rdma-job:latest
job_launcher:
  default_python_path: /usr/local/bin/python3
"""
_DOCKER_DEVICES = """\
  # Only where the host has RDMA devices: the devices, and leave to pin memory for them.
  default_job_container_kwargs:
    devices:
      - /dev/infiniband:/dev/infiniband:rwm
    cap_add:
      - IPC_LOCK
    ulimits:
      - {Name: memlock, Soft: -1, Hard: -1}
"""
_K8S = """\
# nvflare deploy prepare {kit} --config k8s.yaml
runtime: k8s
namespace: nvflare
parent:
  docker_image: nvflare-rdma-job:latest
job_launcher:
  default_python_path: /usr/local/bin/python3
"""
_STUDY_RUNTIME = """\
# local/study_runtime.yaml of a site whose nodes have RDMA devices
format_version: 2
studies:
  default:
    container:
      image: nvflare-rdma-job:latest
    pod_template: pod_specs/rdma-pod.yaml
"""
_POD = """\
# local/pod_specs/rdma-pod.yaml: a job's pod that sees the RDMA devices of its node, and may pin memory.
#
# FLARE 2.9 replaces the resources of the job's container, so a request for "rdma/hca" that stands here is lost. Where
# pods must not be privileged, have an admission policy add that request to pods with the label below instead, and leave
# out volume, mount and privilege.
apiVersion: v1
kind: Pod
metadata:
  name: job
  labels:
    nvflare-rdma: "true"
spec:
  restartPolicy: Never
  containers:
    - name: nvflare_job
      image: nvflare-rdma-job:latest
      securityContext:
        privileged: true
      volumeMounts:
        - {name: infiniband, mountPath: /dev/infiniband}
  volumes:
    - name: infiniband
      hostPath: {path: /dev/infiniband, type: Directory}
"""
_SLURM = """\
# nvflare deploy prepare {kit} --config slurm.yaml
runtime: slurm
job_launcher:
  sandbox: none
  python_path: /opt/nvflare/bin/python3
  # Jobs on compute nodes with RDMA devices pin memory for them.
  setup: |
    ulimit -l unlimited || echo "memory can't be pinned on this node: nvflare-rdma doctor says what that means"
  # What sbatch passes on to the jobs; these settings may also be in comm_config.json.
  forward_env:
    - NVFLARE_RDMA_MEMORY_BUDGET_BYTES
"""


@dataclass(frozen=True)
class Site:
    """What a snippet depends on.

    Attributes:
        kit: the start-up kit's folder, as it is written in commands.
        port: the one that its parent has for direct links; None if others need not reach it.
        service: the name of its Service in Kubernetes; "" if that is FLARE's to say.
        devices: whether it has RDMA devices.
    """

    kit: str = "KIT"
    port: int | None = _PORT
    service: str = "nvflare-server"
    devices: bool = True


def snippet_result(runtime: str, folder: Path | None) -> Result:
    """What `printed` gives for a site, and its parts.

    Raises:
        CommandError: there is no such kit, or a setting in it is wrong.
    """
    site = site_in(folder)
    data = {"runtime": runtime, "files": snippets(runtime, site), "commands": commands(runtime, site)}
    return Result(data, printed(runtime, site))


def printed(runtime: str, site: Site) -> str:
    """The configuration for `nvflare deploy prepare`, which reads one document from the file that this is written to.
    Behind it, as comments: what other files of the kit are to have, and the commands."""
    (_, config), *others = snippets(runtime, site).items()
    for name, content in others:
        config += f"# And {name}, without what each line begins with:\n"
        config += "".join(f"#| {line}\n" for line in content.splitlines())
    after = commands(runtime, site)[1:]  # the first is at the top
    return config + "# And then:\n" + "\n".join(f"# {line}" for step in after for line in step.splitlines())


def site_in(folder: Path | None, sysfs: Path = SYSFS) -> Site:
    """What a kit and this host say; the defaults of a server if there is no kit."""
    devices = any(not port.software and not port.refusal for port in list_ports(sysfs))
    if folder is None:
        return Site(devices=devices)
    from nvflare_rdma.cli.doctor import settings_of

    with told():
        kits = [kit for kit in find_kits(folder) if kit.role != ADMIN]
    if len(kits) != 1:
        what = f"{len(kits)} kits of a server or site" if kits else "no kit of a server or site"
        raise CommandError("NO_KIT", f"{folder} has {what}", "name the folder of one")
    (kit,) = kits
    settings = settings_of(kit.folder)
    ports = settings.rdma_data_ports
    port = ports[0] if isinstance(ports, tuple) else _PORT if kit.role == SERVER else None
    # As FLARE's chart names it; another name than one of DNS is made into one there.
    service = "nvflare-server" if kit.role == SERVER else kit.name if _SERVICE_NAME.fullmatch(kit.name) else ""
    return Site(shlex.quote(str(folder)), port, service, devices)


def snippets(runtime: str, site: Site) -> dict[str, str]:
    """File name -> what is in it: the configuration of `nvflare deploy prepare` first, then files of the kit."""
    if runtime == DOCKER:
        return {"docker.yaml": _DOCKER.format(kit=site.kit) + (_DOCKER_DEVICES if site.devices else "")}
    if runtime == SLURM:
        return {"slurm.yaml": _SLURM.format(kit=site.kit)}
    kit = {"local/study_runtime.yaml": _STUDY_RUNTIME, "local/pod_specs/rdma-pod.yaml": _POD}
    return {"k8s.yaml": _K8S.format(kit=site.kit), **(kit if site.devices else {})}


def commands(runtime: str, site: Site) -> list[str]:
    """What is to be done with the files, in this order."""
    prepared = f"{site.kit}/prepared/{runtime}"
    enable = f"nvflare-rdma enable {prepared}" + (f" --data-port {site.port}" if site.port else "")
    if runtime != SLURM:  # there, parents and jobs use an installation that all nodes see
        enable += f" --driver-path \\\n  {IMAGE_DRIVER}"
    steps = [f"nvflare deploy prepare {site.kit} --config {runtime}.yaml", enable]
    if site.port and runtime == DOCKER:
        steps.append(f"add `-p {site.port}:{site.port}` to `docker run` in {prepared}/startup/start_docker.sh")
    if site.port and runtime == K8S:
        add = f'{{"name": "rdma", "port": {site.port}, "targetPort": {site.port}}}'
        steps.append(
            f"kubectl -n nvflare patch service {site.service or 'SERVICE'} --type json -p \\\n"
            f"""  '[{{"op": "add", "path": "/spec/ports/-", "value": {add}}}]'"""
        )
    return steps
