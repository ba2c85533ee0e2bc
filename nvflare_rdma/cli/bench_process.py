"""The other process of a bench within this host, which this one starts and ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nvflare_rdma.cli.output import ENVIRONMENT, CommandError

#: How long it has to end, before it is killed.
_END_SECONDS = 5.0


@contextmanager
def own_process(folder: Path | None, run: str, ending: float) -> Iterator[int]:
    """The port of a peer of this process's own, on this host.

    Raises:
        CommandError: it has ended, or was not there when time was over.
    """
    # Nothing of it comes from the folder that the user is in.
    command = [sys.executable, "-P", "-c", "from nvflare_rdma.cli.bench_listen import serve_own_process as s; s()"]
    seconds = max(ending - time.monotonic(), 0.0)
    asked = {"kit": None if folder is None else str(folder), "run": run, "seconds": seconds}
    with tempfile.TemporaryFile(mode="w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, text=True, **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Timer(seconds, process.kill)
            late.daemon = True
            late.start()
            try:
                line = ""
                with contextlib.suppress(BrokenPipeError):  # it has ended before it was told anything
                    print(json.dumps(asked), file=process.stdin, flush=True)
                    line = process.stdout.readline()
                late.cancel()
                if not line.endswith("\n"):
                    raise _ended(errors, time.monotonic() >= ending)
                yield int(json.loads(line)["port"])
            finally:
                late.cancel()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                try:
                    process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _ended(errors: IO[str], late: bool) -> CommandError:
    if late:
        text = "the other process of the bench did not start within --timeout"
        return CommandError("NO_PEER", text, "give it more time", ENVIRONMENT)
    errors.seek(0)
    why = (errors.read().strip().splitlines() or ["it says nothing"])[-1]
    return CommandError(
        "NO_PEER", f"the other process of the bench has ended: {why}", "run `nvflare-rdma doctor` here", ENVIRONMENT
    )
