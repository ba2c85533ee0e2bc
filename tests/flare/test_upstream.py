"""The tool that runs FLARE's own tests; what it needs of FLARE's sources is not here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("upstream.py")
spec = importlib.util.spec_from_file_location("upstream", PATH)
upstream = sys.modules["upstream"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upstream)

TESTS = """
import pytest
class TestIt:
    def test_good(self): pass
    def test_bad(self): assert False, "it is wrong"
    @pytest.mark.skip
    def test_left_out(self): pass
def test_plain(record_property): record_property("direct", 2)
"""


@pytest.fixture
def checkout(tmp_path):
    path = tmp_path / "flare" / upstream.ROOT / "fuel" / "f3" / "streaming" / "x_test.py"
    path.parent.mkdir(parents=True)
    path.write_text(TESTS)
    (tmp_path / "flare" / "nvflare").mkdir()
    return tmp_path / "flare"


@pytest.mark.parametrize("ref", [None, "HEAD"])
def test_a_checkouts_tests_and_a_commits(checkout, ref, tmp_path):
    if ref:
        for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm a", "rm -qr ."):
            subprocess.run(["git", "-C", str(checkout), *command.split()], check=True, timeout=20)
    upstream.lay_out(checkout, ref, tmp_path / "out")
    assert not (tmp_path / "out" / "nvflare").exists()  # what is tested is the installed one
    assert (tmp_path / "out" / upstream.ROOT / "fuel" / "f3" / "streaming" / "x_test.py").exists()


def test_results(checkout, tmp_path):
    upstream.lay_out(checkout, None, tmp_path / "out")
    results = upstream.run_tests(tmp_path / "out", "stock", False, [])
    found = {name.rpartition("::")[2]: (result.outcome, result.direct) for name, result in results.items()}
    assert found == {
        "test_good": ("passed", 0),
        "test_bad": ("failed", 0),
        "test_left_out": ("skipped", 0),
        "test_plain": ("passed", 2),
    }
    assert "| fuel/f3/streaming/x_test.py | 2/1/1 | 2/1/1 | 1 |" in upstream.table(results, results)


def test_what_is_worse_with_ours():
    good, bad = upstream.Result("passed"), upstream.Result("failed", "why")
    worse = upstream.only_ours({"a": good, "b": good, "c": bad, "d": good}, {"a": good, "b": bad, "c": bad})
    assert worse == {"b": bad, "d": upstream.Result("failed", "did not run")}
