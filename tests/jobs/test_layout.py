"""The jobs have FLARE's example layout, and what they ask for is what the tests have."""

from __future__ import annotations

from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

JOBS = Path(__file__).parents[2] / "jobs"
NAMES = ["file_model", "gpt2_small", "lora_gpt2", "stdlib_lm", "swarm_lm"]
FILES = {"job.py", "client.py", "model.py", "README.md", "requirements.txt"}


def test_every_job_is_known():
    assert sorted(file.parent.name for file in JOBS.glob("*/job.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_job_has_the_layout_of_flares_examples(name):
    assert {file.name for file in (JOBS / name).iterdir()} >= FILES
    readme = (JOBS / name / "README.md").read_text()
    assert len(readme.splitlines()) < 80
    assert f"python jobs/{name}/job.py" in readme


@pytest.mark.parametrize("name", NAMES)
def test_what_a_job_requires_is_an_extra_of_the_package(name):
    """So a requirement that no extra has is none that the tests have tried."""
    lines = (JOBS / name / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    extras = {Requirement(each).name for each in requires("nvflare-rdma") or [] if "extra ==" in each}
    (package,) = (each for each in wanted if each.name == "nvflare-rdma")
    known = {each.split('extra == "')[1].rstrip('"') for each in requires("nvflare-rdma") or [] if 'extra == "' in each}
    assert package.extras <= known
    for each in wanted:
        if each is not package:
            assert each.name in extras
            if each.name != "torch":
                pytest.importorskip(each.name)
                assert each.specifier.contains(version(each.name), prereleases=True), each
