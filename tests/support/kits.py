"""Start-up kits, made by FLARE's own provisioning in this process, and what tests of the commands for them share."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import ProvFileName
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Project
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder

from nvflare_rdma.cli import main

ALL = [
    "--fabrics",
    "shm,tcp",
    "--memory-budget",
    "256MiB",
    "--data-port",
    "20000-20010",
    "--patience",
    "4h",
    "--upgrade-driver",
]
DOCKER = {"runtime": "docker", "parent": {"docker_image": "image:1"}}
SERVER, SITE_1, SITE_2 = "server", "site-1", "site-2"
_IMPL = "nvflare.lighter.impl"
WORKSPACE = {"path": f"{_IMPL}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}}
CERT = {"path": f"{_IMPL}.cert.CertBuilder"}
SIGNATURE = {"path": f"{_IMPL}.signature.SignatureBuilder"}
SITES = ("site-1", "site-2")


def static_file(scheme: str = "tcp") -> dict[str, Any]:
    """The builder that writes most of a kit."""
    return {"path": f"{_IMPL}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": scheme}}


def poc(folder: Path) -> Path:
    """The workspace of `nvflare poc prepare -n 2`. Its kits are in example_project/prod_00."""
    from nvflare.tool.poc.poc_commands import prepare_poc_provision

    workspace = folder / "poc"
    prepare_poc_provision([], len(SITES), str(workspace), "")
    return workspace


def provision(folder: Path, builders: Sequence[dict[str, Any]], **site: Any) -> Path:
    """The newest kits of a project that has a server, two sites and an admin. `site` is what the project says of
    each site besides."""
    kind = {"org": "nvidia"}
    participants = [
        {"name": "server", "type": "server", "fed_learn_port": 8002, **kind},
        *({"name": name, "type": "client", **kind, **site} for name in SITES),
        {"name": "admin@nvidia.com", "type": "admin", "role": "project_admin", **kind},
    ]
    project = {"api_version": 3, "name": "project", "description": "", "participants": participants}
    Provisioner(str(folder), prepare_builders({"builders": list(builders)})).provision(prepare_project(project))
    return max((folder / "project").glob("prod_*"), default=folder / "no kits")


def prepared(kit: Path, config: dict[str, Any]) -> Path:
    """What `nvflare deploy prepare` makes of a kit."""
    from nvflare.tool.deploy.deploy_commands import prepare_deployment

    file = kit.parent / f"{config['runtime']}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    output = kit.parent / f"{kit.name}-{config['runtime']}"
    prepare_deployment(Namespace(kit=str(kit), config=str(file), output=str(output)))
    return output


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files below a folder, with their modes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Tenseal(Builder):
    """Puts a file into each kit, by which FLARE's SignatureBuilder sees that sites encrypt homomorphically."""

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        for participant in project.get_all_participants():
            (Path(ctx.get_kit_dir(participant)) / ProvFileName.CLIENT_CONTEXT_TENSEAL).write_bytes(b"context")


def run(*arguments) -> int:
    return main([str(each) for each in arguments])


def config(kit: Path) -> dict:
    return json.loads((kit / "local/comm_config.json").read_text())


def change(file: Path, **values) -> bytes:
    """Have the operator set something; returns what the file then has."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}, indent=2))
    return file.read_bytes()


def has_door(file: Path) -> bool:
    return "nvflare_rdma.streaming.ParentDoor" in [each["path"] for each in json.loads(file.read_text())["components"]]
