"""What numba has kept of compiled kernels, and a full disk or a power failure has damaged since."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import numba
import pytest
from processes import run

SCRIPT = """
import numpy as np
from nvflare_rdma.codecs.kernels import jit

def total(values, scale):
    found = np.float64(0)
    for i in range(values.size):
        found += values[i] * scale
    return found

signature = jit.float64_value(jit.float32, jit.float64_value)
for _ in range(2):  # what is written by the first is there for the second
    assert jit.kernel(signature)(total)(np.arange(5, dtype=np.float32), 2.0) == 20
    print("made")
"""
DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut after the version": lambda content: content[:20],
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: random.Random(3).randbytes(len(content)),
    "something else": lambda content: pickle.dumps(numba.__version__) + pickle.dumps(7),
}


def make_two(script: Path, cache: Path) -> list[str]:
    """What numba did with its cache, for each of the two kernels made."""
    done = run(script, timeout=120, NUMBA_CACHE_DIR=str(cache), NUMBA_DEBUG_CACHE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("made\n")[:2]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A script, and what numba keeps after it has run."""
    folder = tmp_path_factory.mktemp("kept")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    first, second = make_two(script, folder / "cache")
    assert "data saved" in first
    assert "data loaded" in second
    return script, folder / "cache"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_it_is_compiled_and_kept_anew(kept, tmp_path, suffix, damage):
    script, pristine = kept
    cache = tmp_path / "cache"
    shutil.copytree(pristine, cache)
    (file,) = cache.rglob(f"*{suffix}")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    first, second = make_two(script, cache)
    assert "data saved" in first
    assert "data loaded" in second
    assert "data saved" not in second


def test_what_cannot_be_written_anew_is_compiled_all_the_same(kept, tmp_path):
    script, pristine = kept
    cache = tmp_path / "cache"
    shutil.copytree(pristine, cache)
    (index,) = cache.rglob("*.nbi")
    index.unlink()
    index.mkdir()  # nobody can read it, nor write over it
    for output in make_two(script, cache):
        assert "data loaded" not in output
