"""The snippets of docs/deploy, as FLARE reads them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from nvflare_rdma.cli import main
from nvflare_rdma.cli.deploy_snippets import RUNTIMES, Site, commands, printed, site_in, snippets
from tests.support.configuration import read_anew
from tests.support.kits import CERT, SIGNATURE, WORKSPACE, change, provision, static_file

DEPLOY = Path(__file__).resolve().parents[1] / "docs" / "deploy"
PAGES = {"docker": "docker.md", "k8s": "kubernetes.md", "slurm": "slurm.md"}
JOB = {
    "name": "job-1",
    "container_name": "container-1",
    "image": "nvflare-rdma-job:latest",
    "command": "nvflare.private.fed.app.client.worker_process",
    "volume_mount_list": [{"name": "workspace-job", "mountPath": "/workspace"}],
    "volume_list": [{"name": "workspace-job", "emptyDir": {}}],
    "require_main_container": True,
    "resources": {"limits": {"ephemeral-storage": "1Gi"}},
}


def load(name: str):
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.mark.parametrize("runtime", ["docker", "k8s", "slurm"])
def test_flare_takes_the_configurations_of_deploy_prepare(runtime):
    from nvflare.tool.deploy import docker_deploy, k8s_deploy, slurm_deploy

    config = load(f"{runtime}.yaml")
    assert config["runtime"] == runtime
    {"docker": docker_deploy, "k8s": k8s_deploy, "slurm": slurm_deploy}[runtime].validate_config(config)


def job_pod(folder: Path):
    """The pod that FLARE starts a job in, with docs/deploy as its site's ``local``."""
    from nvflare.app_opt.job_launcher.k8s_launcher import K8sJobHandle
    from nvflare.app_opt.job_launcher.study_runtime import load_study_runtime_file, resolve_study_runtime

    shutil.copytree(DEPLOY, folder / "local")
    path = str(folder / "local" / "study_runtime.yaml")
    study = resolve_study_runtime(load_study_runtime_file(path, "k8s"), "default", path)
    assert study.container_image == JOB["image"]
    return K8sJobHandle("1", None, JOB, pod_manifest_template=study.pod_template).get_manifest()


def test_a_job_on_kubernetes_sees_the_rdma_devices_of_its_node(tmp_path):
    spec = job_pod(tmp_path)["spec"]
    (container,) = spec["containers"]
    assert {"name": "infiniband", "mountPath": "/dev/infiniband"} in container["volumeMounts"]
    assert "infiniband" in [volume["name"] for volume in spec["volumes"]]
    assert container["securityContext"] == {"privileged": True}


def test_flare_drops_the_resources_of_a_pod_template():
    # As the snippet says. If FLARE keeps them some day, the snippet can ask for "rdma/hca" and need no privilege.
    from nvflare.app_opt.job_launcher.k8s_launcher import K8sJobHandle

    template = load("pod_specs/rdma-pod.yaml")
    template["spec"]["containers"][0]["resources"] = {"limits": {"rdma/hca": 1}}
    (container,) = K8sJobHandle("1", None, JOB, pod_manifest_template=template).get_manifest()["spec"]["containers"]
    assert container["resources"] == JOB["resources"]


def test_the_image_has_what_the_package_says():
    text = (DEPLOY / "Dockerfile").read_text()
    # A command goes on in the next line after a backslash, and in no other way.
    lines = re.sub(r"\\\n", " ", text).splitlines()
    words = {line.split()[0] for line in lines if line and not line.startswith("#")}
    assert words <= {"FROM", "RUN", "ARG", "ENV"}
    assert "nvflare>=2.9,<2.10" in text


def told_in(page: str) -> str:
    """What a page says, in one line, without marks of code."""
    return re.sub(r"[\s\\`]+", " ", page)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_doctor_prints_what_the_page_shows(runtime):
    for name, text in snippets(runtime, Site()).items():
        assert (DEPLOY / name.removeprefix("local/")).read_text() == text, f"docs/deploy and deploy_snippets.py: {name}"
    page = told_in((DEPLOY.parent / PAGES[runtime]).read_text())
    steps = commands(runtime, Site(kit="server"))
    assert f"# {steps[0].replace('server', 'KIT')}\n" in (DEPLOY / f"{runtime}.yaml").read_text()
    for step in steps:
        assert told_in(step) in page, f"docs/{PAGES[runtime]} does not say: {step}"


def test_the_pages_show_every_file():
    shown = [
        name
        for page in ("containers.md", *PAGES.values())
        for name in re.findall(r"\{literalinclude\} deploy/(\S+)", (DEPLOY.parent / page).read_text())
    ]
    assert sorted(shown) == sorted(path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file())


@pytest.mark.parametrize("devices", [True, False])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_doctor_prints_is_a_file_that_flare_takes(runtime, devices):
    """With other files and the commands behind it, which are comments: FLARE reads one document."""
    from nvflare.tool.deploy import docker_deploy, k8s_deploy, slurm_deploy

    site = Site(devices=devices)
    written = printed(runtime, site)
    {"docker": docker_deploy, "k8s": k8s_deploy, "slurm": slurm_deploy}[runtime].validate_config(
        yaml.safe_load(written)
    )
    for name, content in list(snippets(runtime, site).items())[1:]:
        _, found, behind = written.partition(f"# And {name}, without what each line begins with:\n")
        assert found
        lines = [line.removeprefix("#| ") for line in behind.splitlines()[: content.count("\n")]]
        assert "\n".join(lines) + "\n" == content


def test_doctor_prints_that_file(capsys):
    assert main(["doctor", "--for", "k8s"]) == 0
    assert capsys.readouterr().out == printed("k8s", site_in(None)) + "\n"


def doctor_for(runtime: str, kit: Path, capsys) -> dict:
    assert main(["doctor", "--for", runtime, "--kit", str(kit), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)["data"]


def test_a_snippet_is_for_a_site(tmp_path, capsys):
    with read_anew():
        kits = provision(tmp_path / "my kits", [WORKSPACE, static_file("http"), CERT, SIGNATURE])
        server, site = kits / "server", kits / "site-1"
        change(server / "local/comm_config.json", rdma_data_ports="9000-9010")
        capsys.readouterr()
        said = doctor_for("k8s", server, capsys)["commands"]
        assert said[0] == f"nvflare deploy prepare '{server}' --config k8s.yaml"
        assert "--data-port 9000" in said[1]
        assert "patch service nvflare-server" in said[2]
        assert '"port": 9000' in said[2]
        said = doctor_for("docker", site, capsys)["commands"]
        assert len(said) == 2  # nobody has to reach a site, unless it is told so
        assert "--data-port" not in said[1]
        assert main(["doctor", "--for", "docker", "--kit", str(kits)]) == 1
        assert "has 3 kits of a server or site" in capsys.readouterr().err


def test_a_host_without_rdma_devices_gives_none_to_its_jobs(tmp_path):
    assert site_in(None, tmp_path) == Site(devices=False)
    (text,) = snippets("docker", Site(devices=False)).values()
    assert "infiniband" not in text
    assert list(snippets("k8s", Site(devices=False))) == ["k8s.yaml"]
