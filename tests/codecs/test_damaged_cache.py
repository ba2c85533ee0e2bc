"""What numba has kept of compiled kernels, and a full disk or a power failure has damaged since."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import numba
import pytest

from tests.support.processes import run

#: Makes one kernel twice with each of the folders for its cache, and prints what numba did with that.
SCRIPT = """
import contextlib, io, json, sys
import numpy as np
from numba.core import config
from nvflare_rdma.codecs.kernels import jit

def twice(values):
    return values[0] * 2.0

def made():
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        kernel = jit.kernel(jit.float64_value(jit.float32))(twice)
    assert kernel(np.full(1, 10, np.float32)) == 20
    return output.getvalue()

config.DEBUG_CACHE = 1
for folder in sys.argv[1:]:
    config.CACHE_DIR = folder
    print(json.dumps([made(), made()]), flush=True)  # what is written by the first is there for the second
"""
DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut after the version": lambda content: content[:20],
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: random.Random(3).randbytes(len(content)),
    "something else": lambda content: pickle.dumps(numba.__version__) + pickle.dumps(7),
}
SUFFIXES = (".nbi", ".nbc")


def make_two(script: Path, *caches: Path) -> list[list[str]]:
    """What numba did with each cache, for each of the two kernels made."""
    done = run(script, *map(str, caches), timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def damage(cache: Path, suffix: str, how: str) -> None:
    (file,) = cache.rglob(f"*{suffix}")
    if how == "no file":  # nobody can read it, nor write over it
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(DAMAGE[how](file.read_bytes()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What was done with each damaged cache. One process for all: its start takes longer than all that it compiles."""
    folder = tmp_path_factory.mktemp("kept")
    script, pristine = folder / "script.py", folder / "cache"
    script.write_text(SCRIPT)
    ((first, second),) = make_two(script, pristine)
    assert "data saved" in first
    assert "data loaded" in second
    cases = [*((suffix, how) for suffix in SUFFIXES for how in DAMAGE), (".nbi", "no file")]
    caches = [folder / str(number) for number in range(len(cases))]
    for cache, case in zip(caches, cases, strict=True):
        shutil.copytree(pristine, cache)
        damage(cache, *case)
    return dict(zip(cases, make_two(script, *caches), strict=True))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_it_is_compiled_and_kept_anew(outcomes, suffix, damage):
    first, second = outcomes[suffix, damage]
    assert "data saved" in first
    assert "data loaded" in second
    assert "data saved" not in second


def test_what_cannot_be_written_anew_is_compiled_all_the_same(outcomes):
    for output in outcomes[".nbi", "no file"]:
        assert "data loaded" not in output
