"""FLARE's own unit tests of what moves tensors and streams, as they are and with this package's transfer installed.

python tests/flare/upstream.py --source FOLDER_OR_GIT_DIR [--ref REF] [-- PYTEST ARGS]

FLARE's sources are needed for its tests alone: what they test is the installed FLARE. Take the commit that is nearest
to it. Prints how each file fares both ways, and which tests only fail with ours; ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = "tests/unit_test"
#: Download service, decomposers, pass-through references, disk offload, streaming, the Client API's process.
PARTS = (
    "apis/utils/decomposers",
    "apis/utils/task_utils_test.py",
    "app_common/ccwf",
    "app_common/decomposers",
    "app_common/executors/client_api*",
    "app_common/executors/*_backend_test.py",
    "app_common/logging",
    "app_common/np/test_np_downloader.py",
    "app_common/streamers",
    "app_common/utils/tensor_disk_offload_context_test.py",
    "app_common/widgets/streaming_test.py",
    "app_opt/pt/test_*",
    "app_opt/tensor_stream",
    "client/cell",
    "client/decomposers_test.py",
    "fuel/f3/cellnet",
    "fuel/f3/streaming",
    "fuel/utils/fobs",
    "private/fed/client/client_runner_test.py",
)
PLUGIN = "upstream_plugin"
_TEST_SECONDS = 120
_RUN_SECONDS = 1800


@dataclass(frozen=True)
class Result:
    """Of one test: "passed", "failed" or "skipped". With ours: how often it reached our decomposers' sending and
    receiving, how many messages' tensors moved directly, their bytes, and how often FLARE's own path was left."""

    outcome: str
    message: str = ""
    reached: int = 0
    direct: int = 0
    nbytes: int = 0
    own_path: int = 0


def lay_out(source: Path, ref: str | None, folder: Path) -> None:
    """Put FLARE's unit tests, and nothing else of it, in ``folder``."""
    folder.mkdir(exist_ok=True)
    if ref is None and (source / ROOT).is_dir():
        shutil.copytree(source / ROOT, folder / ROOT)
        return
    git_dir = source / ".git" if (source / ".git").exists() else source
    archive = ["git", f"--git-dir={git_dir}", "archive", ref or "HEAD", ROOT]
    packed = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=packed)


def run_tests(folder: Path, name: str, ours: bool, arguments: list[str]) -> dict[str, Result]:
    """Each test's result. In a process of its own: FLARE keeps what it has registered for as long as it lives."""
    report = folder / f"{name}.xml"
    parts = [str(path.relative_to(folder)) for part in PARTS for path in sorted((folder / ROOT).glob(part))]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-p", PLUGIN] if ours else []
    command += ["--continue-on-collection-errors", f"--timeout={_TEST_SECONDS}", *parts, *arguments]
    package = HERE.parents[1]
    paths = [str(folder), str(package), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    output = folder / f"{name}.log"
    with output.open("wb") as log:
        subprocess.run(command, check=False, cwd=folder, env=environment, stdout=log, stderr=log, timeout=_RUN_SECONDS)
    if not report.exists():
        raise SystemExit(f"pytest left no report:\n{output.read_text()[-4000:]}")
    return read_report(report)


def read_report(path: Path) -> dict[str, Result]:
    """Results by test, from what pytest has written."""
    found: dict[str, Result] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = [part for part in case if part.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        told = {part.get("name"): int(part.get("value", "0")) for part in case.iter("property")}
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        known = found.get(name)
        if known is not None and known.outcome == "failed":
            continue  # failed in its call, then in its teardown
        found[name] = Result(
            "failed" if wrong else "skipped" if skipped else "passed",
            (wrong[0].get("message") or "").splitlines()[0] if wrong and wrong[0].get("message") else "",
            told.get("reached", 0),
            told.get("direct", 0),
            told.get("nbytes", 0),
            told.get("own_path", 0),
        )
    return found


def file_of(name: str) -> str:
    """``tests.unit_test.fuel.x_test.TestX::test_y`` -> ``fuel/x_test.py``."""
    module, _, test = name.partition("::")
    parts = (module or test).removeprefix("tests.unit_test.").split(".")
    while parts and parts[-1][:1].isupper():
        parts.pop()
    return "/".join(parts) + ".py"


def table(stock: dict[str, Result], ours: dict[str, Result]) -> str:
    """A row a file."""

    def counts(results: dict[str, Result], file: str) -> str:
        tally = Counter(result.outcome for name, result in results.items() if file_of(name) == file)
        return "/".join(str(tally[outcome]) for outcome in ("passed", "failed", "skipped"))

    files = sorted({file_of(name) for name in (*stock, *ours)})
    rows = ["| passed/failed/skipped | FLARE | with ours | move directly |", "|---|---|---|---|"]
    for file in files:
        direct = sum(bool(result.direct) for name, result in ours.items() if file_of(name) == file)
        rows.append(f"| {file} | {counts(stock, file)} | {counts(ours, file)} | {direct or ''} |")
    return "\n".join(rows)


def only_ours(stock: dict[str, Result], ours: dict[str, Result]) -> dict[str, Result]:
    """What passes as it is, and fails or is missing with ours."""
    missing = Result("failed", "did not run")
    return {
        name: ours.get(name, missing)
        for name, result in stock.items()
        if result.outcome == "passed" and ours.get(name, missing).outcome != "passed"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="FLARE's checkout or git directory")
    parser.add_argument("--ref", help="commit whose tests are taken; without it a checkout's own files, or HEAD")
    parser.add_argument("pytest_args", nargs="*", help="after --: passed to pytest")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flare-tests-") as name:
        folder = Path(name)
        lay_out(args.source, args.ref, folder)
        stock = run_tests(folder, "stock", False, args.pytest_args)
        ours = run_tests(folder, "ours", True, args.pytest_args)
    worse = only_ours(stock, ours)
    print(table(stock, ours))
    for title, results in (("FLARE", stock), ("with ours", ours)):
        tally = Counter(result.outcome for result in results.values())
        print(f"{title}: {tally['passed']} passed, {tally['failed']} failed, {tally['skipped']} skipped")
    moved = [result for result in ours.values() if result.direct]
    print(
        f"{sum(bool(r.reached) for r in ours.values())} tests reach our decomposers; {len(moved)} of them move the"
        f" tensors of {sum(r.direct for r in moved)} messages, {sum(r.nbytes for r in moved)} bytes, directly;"
        f" {sum(bool(r.own_path) for r in ours.values())} try to, and take FLARE's own path"
    )
    print("fail as they are: " + (", ".join(n for n, r in stock.items() if r.outcome == "failed") or "none"))
    print(f"pass as they are, and fail with ours: {len(worse)}")
    for test, result in worse.items():
        print(f"  {test}: {result.message}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
