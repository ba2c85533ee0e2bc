"""Run a command in a throw-away guest with soft-RoCE and soft-iWARP devices:

    python tests/guest/guest.py [--timeout S] [--at-most S] [--memory MiB] [--out DIR] -- COMMAND ...

The guest is a QEMU machine with an emulated CPU (no KVM needed). Its root is this machine's file system with a
writable layer in memory over it, so it has the same Python and the same repository, and changes nothing here.
COMMAND runs as root at the repository's root; what it writes to the folder named by $OUT is in --out afterwards,
and so is the console's text. At boot the guest measures how slow it is (`speed`): --timeout is as many times longer,
--at-most is not.
The exit status is COMMAND's, or 123: the guest died under COMMAND; 124: time is up; 125: the guest did not come up.
"""

from __future__ import annotations

import argparse
import math
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import host
import initramfs
import kernel
import speed

ROOT = Path(__file__).resolve().parents[2]
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
DIED, TIME_IS_UP, NOT_UP = 123, 124, 125
# Booting takes some 7 s on an idle machine, and 40 s on one of half the speed that has five times as much to do.
BOOT_DEADLINE = 180.0
# Quiet but for warnings; a panic ends the machine at once. The clock is the host's: where that is busy and the guest
# stands still for a while, the kernel is not to conclude that its clock or its timer is broken, and to take another.
KERNEL_OPTIONS = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check"
OUT_IN_GUEST = "/run/out"
CONSOLE = "console.txt"  # in --out


class GuestError(Exception):
    """COMMAND has no status of its own; ``status`` says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def run(
    command: Sequence[str], out: Path, timeout: float = 600.0, memory: int = 6144, at_most: float = math.inf
) -> int:
    """Run ``command`` in a guest and return its exit status.

    It has ``timeout`` seconds from the guest's start on a machine of the reference's speed, and as many times more on
    a slower one, but no more than ``at_most`` seconds from now.
    """
    linux = kernel.prepare()
    if not linux.siw.exists():
        print(
            f"guest: without siw, which could not be built: see {linux.siw_log}; 'rm -r {kernel.CACHE}' to try again",
            file=sys.stderr,
        )
    deadline = time.monotonic() + at_most
    archive = initramfs.build(linux)
    out.mkdir(parents=True, exist_ok=True)
    for last_try in (False, True):
        try:
            return _Guest(linux, archive, out.resolve(), memory).run(command, timeout, deadline)
        except GuestError as error:
            # Only a boot is tried again: a command that has started may not be run twice.
            if error.status != NOT_UP or last_try or time.monotonic() > deadline:
                raise
            print(f"guest: {error}\nguest: one more try", file=sys.stderr)
    raise AssertionError("unreachable")


class _Guest:
    def __init__(self, linux: kernel.Kernel, archive: bytes, out: Path, memory: int) -> None:
        self._linux, self._archive, self._out, self._memory = linux, archive, out, memory
        self._tail = ""
        (out / CONSOLE).write_text("")

    def run(self, command: Sequence[str], timeout: float, deadline: float) -> int:
        begin = time.monotonic()
        boot_deadline = min(deadline, begin + BOOT_DEADLINE)
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-")))
            control = work / "control"
            control.mkdir()
            (control / "command").write_text(_script(command))
            started, status = control / "started", control / "status"
            qemu = stack.enter_context(_process(self._qemu(stack, work), stdout=subprocess.PIPE))
            up = False
            for text in _console(qemu):
                self._show(text)
                now = time.monotonic()
                if not up and started.exists():
                    up = True
                    factor = float((control / speed.FILE).read_text())
                    deadline = min(deadline, begin + timeout * factor)
                    print(
                        f"guest: up after {now - begin:.1f} s; {factor:.1f} times slower than the reference, so it has "
                        f"{deadline - begin:.0f} s",
                        file=sys.stderr,
                    )
                if now > (deadline if up else boot_deadline):
                    took = f"{now - begin:.0f} s after the guest's start"
                    if up:
                        raise self._error(
                            TIME_IS_UP, f"time is up: the command still ran {took} (see --timeout and --at-most)"
                        )
                    raise self._error(NOT_UP, f"the guest was not up {took}")
            self._show("" if self._tail.endswith("\n") else "\n")
            qemu.wait()
            took = f"after {time.monotonic() - begin:.1f} s"
            if not started.exists():
                raise self._error(NOT_UP, f"QEMU ended with {qemu.returncode} {took}, before the guest was up")
            if not status.exists() or not (text := status.read_text().strip()):
                raise self._error(DIED, f"the guest died {took}, before the command ended")
            print(f"guest: the command ended with {text} {took}", file=sys.stderr)
            return int(text)

    def _show(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            with open(self._out / CONSOLE, "a") as console:
                console.write(text)
            self._tail = (self._tail + text)[-8000:]

    def _error(self, status: int, reason: str) -> GuestError:
        console = "".join(f"\n    {line}" for line in self._tail.strip().splitlines()[-40:])
        return GuestError(status, f"{reason}. The console's last lines:{console or ' (none)'}")

    def _qemu(self, stack: ExitStack, work: Path) -> list[str | Path]:
        (work / "initramfs").write_bytes(self._archive)
        # virtiofsd shares / only as root; 9p does it for everyone, a little slower.
        root_type = "virtiofs" if VIRTIOFSD.exists() and os.geteuid() == 0 else "9p"
        memory = f"{self._memory}M"
        if not (binary := shutil.which("qemu-system-x86_64")):
            raise host.HostError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
        # One CPU: with two emulated ones now and then a boot hangs.
        options: list[str | Path] = [
            *("-accel", "tcg", "-smp", "1", "-cpu", "max", "-m", memory),
            *("-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,i8042=off"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-device", "virtio-rng-pci"),
            *("-kernel", self._linux.image, "-initrd", work / "initramfs"),
            *("-append", f"{KERNEL_OPTIONS} ROOT_TYPE={root_type}"),
            *_shared_folder("control", work / "control"),
            *_shared_folder("out", self._out),
        ]
        if root_type == "9p":
            return [binary, *options, *_shared_folder("root", Path("/"), ",readonly=on,multidevs=remap")]
        path = work / "virtiofsd"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            number = listener.fileno()
            serve: list[str | Path] = [
                VIRTIOFSD,
                f"--fd={number}",
                "-o",
                "source=/,sandbox=chroot,cache=always,log_level=warn",
            ]
            # It has nothing to say but that the guest has gone.
            stack.enter_context(
                _process([*serve, "--thread-pool-size=2"], stderr=subprocess.DEVNULL, pass_fds=(number,))
            )
        # The file system's server works in the guest's memory.
        options += [
            *("-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-numa", "node,memdev=memory"),
            *("-chardev", f"socket,id=root,path={path}", "-device", "vhost-user-fs-pci,chardev=root,tag=root"),
        ]
        return [binary, *options]


def _script(command: Sequence[str]) -> str:
    """What the guest's PID 1 runs."""
    venv = Path(sys.prefix) / "bin"
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "OUT": OUT_IN_GUEST,
        "PATH": f"{venv}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        # In memory, and apart from the folders that the host's tests left in /tmp and pytest would tidy up.
        "PYTEST_DEBUG_TEMPROOT": "/run",
        # Plugins that take seconds to import on an emulated CPU; @given works without its one.
        "PYTEST_ADDOPTS": "-p no:cacheprovider -p no:hypothesispytest -p no:xdist",
        "RDMA_TEST_DEVICES": "rxa,rxb",
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    return f"""{exports}cd {shlex.quote(str(ROOT))} || exit
limits=$(python -I -S tests/guest/speed.py /run/guest/{speed.FILE}) || exit
eval "$limits"
sh tests/guest/network.sh up || exit
if [ -e /sys/class/infiniband/swa ]; then export RDMA_TEST_IWARP_DEVICES=swa,swb; fi
: >/run/guest/started
{shlex.join(command)}
"""


def _shared_folder(tag: str, path: Path, extra: str = "") -> tuple[str, str]:
    # A comma in a path is written twice.
    return "-virtfs", f"local,mount_tag={tag},path={str(path).replace(',', ',,')},security_model=none,id={tag}{extra}"


@contextmanager
def _process(
    command: Sequence[str | Path],
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when the block or this process ends, however it ends."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _console(qemu: subprocess.Popen[bytes]) -> Iterator[str]:
    """What the guest prints, as it comes; an empty string every half second in which it prints nothing."""
    assert qemu.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(qemu.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(0.5):
                yield ""
                continue
            if not (data := os.read(qemu.stdout.fileno(), 65536)):
                return
            yield data.replace(b"\r", b"").decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command in a throw-away guest with software RDMA devices.")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds, the boot included; longer on slow machines"
    )
    parser.add_argument("--at-most", type=float, default=math.inf, metavar="S", help="seconds, on any machine")
    parser.add_argument("--memory", type=int, default=6144, metavar="MiB")
    parser.add_argument("--out", type=Path, default=kernel.CACHE / "out", metavar="DIR", help="$OUT in the guest")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    # So that an ended run cleans up too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run(args.command, args.out, args.timeout, args.memory, args.at_most)
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return error.status
    except host.HostError as error:
        print(f"guest: {error}", file=sys.stderr)
        return NOT_UP


if __name__ == "__main__":
    sys.exit(main())
