"""The snippets of docs/deploy, as FLARE reads them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "docs" / "deploy"
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
