"""FLARE's simulator with the driver of your choice between the server and its sites.

FLARE's simulator always uses its `tcp` driver. `RdmaSimEnv` is FLARE's `SimEnv` with one more argument, `scheme`;
everything else (workspace layout, errors, return codes) is `SimEnv`'s own. The same switch gives `tcp` and `grpc`,
so that drivers are compared with everything else equal.

    recipe.run(RdmaSimEnv(num_clients=3, workspace_root="ws", scheme="rdma"))

    python -m nvflare_rdma.simulator JOB_FOLDER -w WORKSPACE -n 3 -t 3 --scheme rdma

The second form takes every option of `nvflare simulator`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvflare.recipe.sim_env import SimEnv

from nvflare_rdma.class_list import allow_for
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import patch_simulator, require_flare, simulator_entry, use_installed_package
from nvflare_rdma.runtime import large_tensors_in_huge_pages, shared

SCHEMES = ("rdma", "tcp", "grpc")
_DRIVER_PATH_VAR = "NVFLARE_COMM_DRIVER_PATH"
_GRPC_FORKS_VAR = "GRPC_ENABLE_FORK_SUPPORT"
_DEFAULT_WORKSPACE = "simulator_workspace"  # that of FLARE's SimulatorRunner
_STOP_SECONDS = 10
_WATCH_SECONDS = 1.0
_HELD_PORTS = 256


def check_scheme(scheme: str) -> str:
    """Return `scheme`, or raise `ConfigError` naming what is allowed."""
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme!r} is not a driver for the simulator. Allowed: {', '.join(SCHEMES)}.")
    return scheme


class RdmaSimEnv(SimEnv):
    """`nvflare.recipe.sim_env.SimEnv` whose server and sites talk over `scheme`.

    Args:
        scheme: "rdma" (this package's driver), or FLARE's "tcp" or "grpc".
        console: a file that takes what the simulator and the sites print, in place of this process's own output.
        kwargs: `SimEnv`'s arguments.

    Raises:
        ConfigError: `scheme` is not one of `SCHEMES`.
        UnsupportedVersionError: the installed FLARE is not 2.9.
    """

    def __init__(self, *, scheme: str = "rdma", console: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        require_flare("RdmaSimEnv")
        self.scheme = check_scheme(scheme)
        self.console = console
        super().__init__(**kwargs)

    def deploy(self, job: Any) -> str:
        """Run `job` to its end and return its name, as `SimEnv.deploy` does (same checks and same errors)."""
        name: str = super().deploy(_SimulatedJob(job, self.scheme, self.console))
        return name


class _SimulatedJob:
    """A FedJob whose `simulator_run` starts this module in place of FLARE's own simulator module."""

    def __init__(self, job: Any, scheme: str, console: str | os.PathLike[str] | None) -> None:
        self._job = job
        self._scheme = scheme
        self._console = console

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def simulator_run(
        self,
        workspace: str,
        n_clients: int | None = None,
        clients: list[str] | None = None,
        threads: int | None = None,
        gpu: str | None = None,
        log_config: str | None = None,
    ) -> int:
        """What `FedJob.simulator_run` does, with the same arguments; returns the simulator's exit status."""
        names = clients or [f"site-{i + 1}" for i in range(n_clients or 0)]
        use_installed_package(self._job)
        with _temporary_folder() as folder:
            self._job.export_job(folder)
            command = [sys.executable, "-m", "nvflare_rdma.simulator", os.path.join(folder, self._job.name)]
            command += [
                "-w",
                workspace,
                "-c",
                ",".join(n.strip() for n in names),
                "-t",
                str(threads or len(names)),
            ]
            command += ["--scheme", self._scheme, "--parent-pid", str(os.getpid())]
            if gpu:
                command += ["-gpu", gpu]
            if log_config:
                command += ["-l", log_config]
            return _run(command, self._console)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Not tempfile's, which is also removed by a forked process that exits meanwhile."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: Sequence[str], console: str | os.PathLike[str] | None) -> int:
    """Run `command` in a session of its own; if this process is interrupted, end that session too."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(console, "ab")) if console else None
        # The simulator forks for each site, and executes Python there. What gRPC does in between, for those who go on
        # after a fork, may hang on a busy machine: the site never comes, and the job never ends.
        environment = {_GRPC_FORKS_VAR: "0", **os.environ}
        process = subprocess.Popen(command, start_new_session=True, stdout=out, stderr=out, env=environment)
        try:
            return process.wait()
        finally:
            if process.returncode is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)  # what is left of the session; the sites end when their parent has
    process.wait()


def _end_with(parent: int) -> None:
    """End this session when `parent` is gone: killed, it can't do so itself. The sites end when we have."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.killpg(0, signal.SIGTERM)


class _HeldPorts:
    """FLARE's `get_open_ports`, whose ports nobody else gets.

    The simulator closes the port that it has found and has a site's process listen there, which takes that some
    seconds to begin with. Where another process was given the port meanwhile, the site dies and the job hangs. A bound
    socket that does not listen keeps the kernel from giving the port away, and as both set SO_REUSEADDR, the site can
    listen there nonetheless (Linux; see socket(7)).
    """

    def __init__(self) -> None:
        # The simulator may start a process for each task. The oldest port is listened to, or of no use any more.
        self._held: deque[socket.socket] = deque(maxlen=_HELD_PORTS)

    def __call__(self, number: int) -> list[int]:
        found = []
        for _ in range(number):
            holder = socket.socket()
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 0))
            self._held.append(holder)
            found.append(int(holder.getsockname()[1]))
        return found


def use_scheme(scheme: str) -> None:
    """Make the simulator of this process, and the sites it will start, use `scheme`."""
    check_scheme(scheme)
    large_tensors_in_huge_pages()
    patch_simulator(scheme, _HeldPorts())
    if scheme == "rdma":
        # Read by FLARE when a cell starts; the sites' processes inherit it.
        folders = [str(Path(__file__).parent / "plugin"), os.environ.get(_DRIVER_PATH_VAR)]
        os.environ[_DRIVER_PATH_VAR] = os.pathsep.join(f for f in folders if f)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job folder in the simulator; returns the simulator's exit status."""
    add_options, run = simulator_entry()
    parser = argparse.ArgumentParser(prog="python -m nvflare_rdma.simulator")
    add_options(parser)
    parser.add_argument("--scheme", choices=SCHEMES, default="rdma", help="driver between server and sites")
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.parent_pid is not None:
        threading.Thread(target=_end_with, args=(args.parent_pid,), daemon=True).start()
        shared().long_waits.draw_for(args.parent_pid)
    use_scheme(args.scheme)
    allow_for(Path(args.job_folder), Path(_DEFAULT_WORKSPACE if args.workspace is None else args.workspace))
    return int(run(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
